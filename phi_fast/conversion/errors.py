"""Errors of reading and writing models; their messages are meant for the person at the terminal."""

from __future__ import annotations

from ..errors import UsageError
from ..json_files import JsonFileError


class ConversionError(UsageError):
    """A model that cannot be read or written; the message lists everything that is wrong."""


class ModelFileError(ConversionError, JsonFileError):
    """A JSON file of a model that does not hold what it should; the message names the file and the field."""

"""Errors from reading and writing models; their messages are meant for the user."""

from __future__ import annotations

from ..errors import UsageError
from ..json_files import JsonFileError


class ConversionError(UsageError):
    """A model cannot be read or written; the message lists everything that is wrong."""


class ModelFileError(ConversionError, JsonFileError):
    """A JSON file of a model has unexpected content; the message names the file and the field."""

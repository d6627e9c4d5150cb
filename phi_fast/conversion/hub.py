"""Uploads a converted model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from .errors import ConversionError
from .target import MARK


def check(repo: str) -> None:
    """Raise ConversionError if `repo` is no name on the hub, or the hub does not know this machine's token."""
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise ConversionError("--push needs huggingface_hub: pip install huggingface_hub") from error
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConversionError(f"--push {repo}: {error}") from error
    if repo.count("/") != 1:
        raise ConversionError(f"--push {repo}: expected OWNER/NAME")
    if get_token() is None:
        raise ConversionError("--push needs a token with write access: run `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # whatever the network, the hub or a refused token raises
        raise ConversionError(
            f"--push {repo}: the hub does not accept the token ({_line(error)}): run `hf auth login`, or check the "
            "network"
        ) from error


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload a folder in one commit, so that the repository holds all of it or none; returns the repository's address.

    private: if the repository is new, only its owner sees it. Raises UsageError if the upload fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, ignore_patterns=[MARK], commit_message="Upload from phi_fast.convert"
        )
    except Exception as error:  # as above
        raise UsageError(
            f"{folder} is written, and could not be uploaded to {repo}: {_line(error)}. The upload is one commit, so "
            f"that {repo} has all of it or none: try `hf upload {repo} {folder}`"
        ) from error
    return str(address)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())

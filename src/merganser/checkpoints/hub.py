"""A model repository on the Hugging Face hub, as a local folder: weights, config and tokenizer, never code."""

from __future__ import annotations

from pathlib import Path

from merganser.errors import RefError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
SAFE_WEIGHTS = ("*.safetensors",)
#: Fetched only where a repository has no safetensors; no optimizer's or trainer's .bin has such a name.
TORCH_WEIGHTS = ("pytorch_model*.bin", "adapter_model*.bin", "diffusion_pytorch_model*.bin")


def snapshot(repo_id: str, revision: str | None = None) -> Path:
    """The folder of a repository in the hub's cache, fetched where it is not there yet.

    Args:
        repo_id: organisation/name.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        RefError: If the extra `hub` is not installed, or the repository cannot be had: it does not exist, is
            gated, holds no weights, or is not in the cache while the hub is out of reach.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise RefError(
            f"hf:{repo_id} needs huggingface_hub, which is missing", 'pip install "merganser[hub]"'
        ) from error
    what = f"hf:{repo_id}" if revision is None else f"hf:{repo_id}@{revision}"
    for weights in (SAFE_WEIGHTS, TORCH_WEIGHTS):
        try:
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[*SMALL_FILES, *weights]))
        except Exception as error:  # errors of the library's network stack come through, and vary by its version
            raise _refusal(what, error) from error
        if any(next(folder.rglob(pattern), None) for pattern in weights):
            return folder
    raise RefError(f"{what} holds no weights", f"no {', '.join((*SAFE_WEIGHTS, *TORCH_WEIGHTS))} in {folder}")


def _refusal(what: str, error: Exception) -> RefError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return RefError(f"{what} is gated", "ask for access on its page, then log in with: hf auth login")
    if isinstance(error, RepositoryNotFoundError):
        return RefError(f"{what} does not exist, or is private", "check the name, or log in with: hf auth login")
    if isinstance(error, RevisionNotFoundError):
        return RefError(f"{what} has no such revision", "name a branch, a tag or a whole commit")
    if isinstance(error, LocalEntryNotFoundError):
        return RefError(
            f"{what} is not in the cache, or only in part, and the hub is out of reach",
            "check the network and that HF_HUB_OFFLINE is not set, or name a local folder",
        )
    if isinstance(error, HFValidationError):
        return RefError(f"{what} is not a hub reference", "write hf:organisation/name or hf:organisation/name@revision")
    reason = str(error).strip().split("\n")[0][:200]
    return RefError(f"{what} cannot be fetched: {type(error).__name__}: {reason}")

"""Uploading a finished checkpoint to the Hub."""

from pathlib import Path

from surgeon.checkpoint.hub_http import LOGIN, explained, hush_progress
from surgeon.errors import HubError


def push(directory: Path, repo_id: str, *, private: bool) -> str:
    """Return the URL of the model repository to which every file of `directory` has been uploaded.

    Creates the repository when there is none. A new one is private if `private`, else what its owner's settings say;
    an existing one is never turned private or public, and one that is public is refused when `private` is asked for.
    Raises HubError.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise HubError(f"cannot upload to {repo_id}: HF_HUB_OFFLINE is set", hint="Unset HF_HUB_OFFLINE.")
    if get_token() is None:
        raise HubError(f"cannot upload to {repo_id} without a token", hint=f"{LOGIN} to a token that can write.")
    hush_progress()
    hub = HfApi()
    with explained(f"the upload to {repo_id}", repo_id=repo_id):
        url = hub.create_repo(repo_id, private=True if private else None, exist_ok=True)
        is_public = private and not hub.model_info(url.repo_id).private
    if is_public:  # exist_ok leaves the visibility of an existing repository as it is
        raise HubError(
            f"{url.repo_id} exists and is public; nothing was uploaded",
            hint=f"Make it private first: hf repos settings {url.repo_id} --private, or push to another name.",
        )
    with explained(f"the upload to {repo_id}", repo_id=repo_id):
        hub.upload_folder(
            repo_id=url.repo_id, folder_path=directory, commit_message=f"Upload {directory.name} made with surgeon"
        )
    return str(url)

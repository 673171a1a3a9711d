"""Uploads a pipeline folder to the Hugging Face Hub: first a list of the files, then exactly these in one commit."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from dia_diffusion.environment import __version__
from dia_diffusion.errors import InputError, RunError
from dia_diffusion.pipelines.folder import INDEX
from dia_diffusion.sharing.code import with_classes
from dia_diffusion.sharing.export import check_pipeline, find_local_path, shared_files


@dataclass(frozen=True)
class Shipment:
    """What would be uploaded, and where to."""

    folder: Path
    repo_id: str
    endpoint: str
    """The Hub's address: huggingface_hub's default, or $HF_ENDPOINT."""
    sizes: dict[Path, int]
    """Path relative to the folder -> bytes."""
    left_out: dict[Path, str]
    """Files that aren't uploaded -> why."""
    carries_code: bool


def prepare(folder: str | Path, repo_id: str) -> Shipment:
    """What would be uploaded from a pipeline folder; makes no connection.

    Args:
        folder: of a UViTPipeline.
        repo_id: such as "name/model".

    Raises:
        InputError: not a complete UViTPipeline (`check_pipeline`), a malformed repo_id, a file that contains a local
            path, or code that `export` wouldn't write.
    """
    folder = Path(folder)
    index = check_pipeline(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(_one_line(error)) from None
    if "/" not in repo_id:
        raise InputError(f"the repo id must be OWNER/NAME, got {repo_id!r}")
    shared, left_out = shared_files(folder)
    for relative in shared:
        if named := find_local_path(folder / relative):
            raise InputError(
                f"{folder / relative} names {named}, a path of this machine; "
                "`dia-diffusion export` makes a copy without such paths"
            )
    carries_code = isinstance(index["_class_name"], list)
    expected, code = with_classes(folder, index, carries_code)
    again = "`dia-diffusion export` makes the folder anew"
    if expected != index:
        raise InputError(f"{folder / INDEX} names other code than this version's; {again}")
    carried = {path for path in shared if path.suffix == ".py"}
    for path in sorted(carried | code.keys()):
        if path not in carried or (folder / path).read_bytes() != code.get(path, "").encode():
            raise InputError(f"{folder / path} is not the code that this version generates; {again}")
    sizes = {relative: (folder / relative).stat().st_size for relative in shared}
    return Shipment(folder, repo_id, HfApi().endpoint, sizes, left_out, carries_code)


def find_token() -> str:
    """The token from huggingface_hub's usual places. Raises InputError if there is none."""
    token = get_token()
    if not token:
        raise InputError("no token of the Hub is set; `hf auth login` stores one, or set HF_TOKEN")
    return token


def send(shipment: Shipment, token: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads the files in one commit; creates the repository if it doesn't exist.

    Args:
        shipment: from `prepare`.
        token: of an account with write access.
        private: creates a new repository as private, and refuses an existing public one.
        revision: a branch, created if missing; None is the main branch.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the token is refused, it can't write to the repository, the repository is public although `private`
            was requested, or the Hub refuses anything else.
        RunError: the Hub can't be reached, or the upload fails.
    """
    api = HfApi(endpoint=shipment.endpoint, token=token, library_name="dia-diffusion", library_version=__version__)
    repo_id = shipment.repo_id
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        # The Hub ignores `private` for an existing repository.
        if private and not api.model_info(repo_id).private:
            raise InputError(f"{repo_id} exists and is public; make it private there first, or choose another name")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(str(path), (shipment.folder / path).absolute()) for path in shipment.sizes]
        message = f"Send a UViTPipeline with dia-diffusion {__version__}"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except InputError:
        raise
    except HfHubHTTPError as error:
        reason = _one_line(error.server_message or error, token)
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{shipment.endpoint} refuses the token for {repo_id} ({status}): {reason}") from None
        if status in (400, 404, 409, 422):
            raise InputError(f"{shipment.endpoint} refuses {repo_id} ({status}): {reason}") from None
        raise RunError(f"{shipment.endpoint} answers with an error ({status}): {reason}") from None
    except (HTTPError, ConnectionError) as error:
        raise RunError(f"{shipment.endpoint} can't be reached: {_one_line(error, token)}") from None
    except Exception as error:  # huggingface_hub wraps errors, and hf_xet can raise anything
        raise RunError(f"sending to {repo_id} failed: {_one_line(error.__cause__ or error, token)}") from None
    return str(commit.commit_url)


def _one_line(error: object, token: str | None = None) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(token, "***") if token else text

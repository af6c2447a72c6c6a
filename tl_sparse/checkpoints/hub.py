"""Uploads to the Hugging Face hub, with a card."""

import re
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData

from tl_sparse.errors import CheckpointError
from tl_sparse.parsing import printable


def push_folder(
    repo_id: str,
    write: Callable[[Path], None],
    card: Callable[[str], str],
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload the files that `write` creates, with a card; return the address of the repository.

    Args:
        repo_id: `"user/repo"`, created if it does not exist; the card in it is replaced.
        write: a function that writes the files into the temporary folder that it is given.
        card: a function from the full name of the repository to the text of the card, README.md.
        private: whether a new repository is private. None means the default of the account.
        revision: a branch, created if it does not exist. None means the main branch.
        token: an access token. None means the token of `hf auth login`.
        commit_message: the message of the commit. None means the default of the hub's client.

    Raises:
        CheckpointError: if the hub cannot be reached or refuses the upload.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        api = HfApi(token=token)
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            (folder / "README.md").write_text(card(url.repo_id), encoding="utf-8")
            api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
            )
        # Any exception: depending on its version, huggingface_hub also raises those of httpx or
        # httpx2.
        except Exception as error:
            raise CheckpointError(f"cannot push to {repo_id!r}: {error}{_hint(error)}") from error
    return str(url)


def _hint(error: Exception) -> str:
    response = getattr(error, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return "; log in with a token that may write there: `hf auth login`"
    return ""


def card_text(
    repo_id: str, what: str, facts: str, load: str, pipeline_tag: str | None = None
) -> str:
    """The README.md of a repository.

    Args:
        repo_id: `"user/repo"`, or only a name.
        what: the first words of the sentence that says what the repository holds, such as "A
            weight-sparse transformer".
        facts: facts and measurements, as several lines of text.
        load: the line of Python that loads the model or circuit.
        pipeline_tag: the task under which the hub lists the repository.
    """
    facts = printable(facts, keep="\n")
    longest = max(map(len, re.findall("`+", facts)), default=0)
    fence = "`" * max(3, longest + 1)  # nothing in the facts ends their block
    data = ModelCardData(
        library_name="tl_sparse", tags=["transformer-lens", "weight-sparse", "interpretability"]
    )
    data.pipeline_tag = pipeline_tag
    return f"""---
{data.to_yaml()}
---
# {repo_id.split("/")[-1]}

{what}
([Gao et al. 2025](https://arxiv.org/abs/2511.13653)), written by tl_sparse {version("tl-sparse")}.

{fence}
{facts}
{fence}

```python
import tl_sparse

{load}
```

A model is a `HookedTransformer` on TransformerLens 3 and a `TransformerBridge` on 4.
"""

"""The endings of the files that `export` writes, checked without slow imports."""

import difflib
from pathlib import Path

from tl_sparse.arguments import checked
from tl_sparse.errors import ConfigError

#: GraphML, DOT, Mermaid, a table of edges, an attribution graph, and EAP-IG's graph of components,
#: whose JSON form has a longer ending.
_ENDINGS = (".graphml", ".dot", ".mmd", ".csv", ".json", ".pt")
_EAP_ENDINGS = (".eap.json", ".pt")


@checked()
def check_export(path: str | Path) -> None:
    """Raise `ConfigError` unless the name of a file ends as those do that `export` writes."""
    ending = Path(path).suffix
    if ending.lower() in _ENDINGS:
        return
    near = difflib.get_close_matches(ending.lower(), _ENDINGS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{path}: nothing is exported as {ending!r}; {hint}Exports end in "
        f"{', '.join(_ENDINGS)} or {_EAP_ENDINGS[0]}"
    )


def is_eap_export(path: str | Path) -> bool:
    """Whether a file with this name is a graph of components."""
    return Path(path).name.lower().endswith(_EAP_ENDINGS)

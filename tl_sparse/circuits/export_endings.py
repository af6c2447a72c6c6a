"""The endings of the files that `export` writes, checked without slow imports."""

import difflib
from pathlib import Path

from tl_sparse.arguments import checked
from tl_sparse.errors import ConfigError

#: GraphML, DOT, Mermaid, a table of edges, and an attribution graph.
_ENDINGS = (".graphml", ".dot", ".mmd", ".csv", ".json")


@checked()
def check_export(path: str | Path) -> None:
    """Raise `ConfigError` unless the name of a file ends as those do that `export` writes."""
    ending = Path(path).suffix
    if ending.lower() in _ENDINGS:
        return
    near = difflib.get_close_matches(ending.lower(), _ENDINGS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{path}: nothing is exported as {ending!r}; {hint}Exports end in {', '.join(_ENDINGS)}"
    )

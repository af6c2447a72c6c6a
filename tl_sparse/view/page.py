"""A circuit as one self-contained HTML page."""

import base64
import hashlib
import html
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_sparse.errors import CircuitError
from tl_sparse.files import write_text
from tl_sparse.view.contents import MAX_BYTES, PASSAGES


@dataclass(frozen=True, eq=False)
class Page:
    """A page, to be saved or to be the value of a notebook's cell; `data` is what `page_data`
    gathered.
    """

    data: dict[str, Any]

    @cached_property
    def html(self) -> str:
        """The whole page, without the last prompts and passages if it had more than `MAX_BYTES`
        with them.
        """
        data, most = self.data, PASSAGES
        while len(page := _fill(data)) > MAX_BYTES and most:
            if len(data["prompts"]) > 1:
                data = data | {"prompts": data["prompts"][:-1]}
                continue
            most -= 1
            nodes = [
                node | {"passages": [side[:most] for side in node["passages"]]}
                for node in data["nodes"]
            ]
            data = data | {"nodes": nodes, "caps": data["caps"] | {"passages": most}}
        if len(page) > MAX_BYTES:
            raise CircuitError(
                f"the page would have {len(page):,} bytes; draw fewer edges, with min_weight"
            )
        return page

    def save(self, path: str | Path) -> None:
        """Write the page; `CheckpointError` if that is not possible."""
        write_text(Path(path), self.html)

    def _repr_html_(self) -> str:
        # In a sandbox of its own, the page can neither read the notebook nor be styled by it.
        source, style = html.escape(self.html), "width:100%;height:900px;border:0"
        return f'<iframe sandbox="allow-scripts" title="circuit" style="{style}" srcdoc="{source}"></iframe>'


def _fill(data: dict[str, Any]) -> str:
    """The page of `data`. In ASCII and without `<`, no text of a model or a corpus can end the
    element it is in.
    """
    folder, names = Path(__file__).parent, ("page.css", "d3.min.js", "page.js", "template.html")
    parts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    # Only these two scripts may run, and nothing may be fetched: a second fence around the first.
    digests = (
        base64.b64encode(hashlib.sha256(parts[name].encode()).digest())
        for name in names
        if name.endswith("js")
    )
    parts["scripts"] = " ".join(f"'sha256-{digest.decode()}'" for digest in digests)
    parts["title"] = html.escape(
        f"{data['summary']['task'] or 'A circuit'} in {data['summary']['model'] or 'a model'}"
    )
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)  # JSON has no NaN
    parts["data"] = json.dumps(finite, separators=(",", ":")).replace("<", "\\u003c")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], parts["template.html"])

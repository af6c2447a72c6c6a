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
from tl_sparse.outputs import check_ending
from tl_sparse.view.limits import LIMITS, PAGE_ENDINGS


@dataclass(frozen=True, eq=False)
class Page:
    """An interactive page, which can be saved, and which a notebook displays.

    Attributes:
        data: the contents, as `page_data` returns them.
    """

    data: dict[str, Any]

    @cached_property
    def html(self) -> str:
        """The HTML of the page.

        If it would be too large, the last prompt pairs are left out, then the last passages.

        Raises:
            CircuitError: if it is still larger than `LIMITS.page_bytes`.
        """
        data = self.data
        n_passages = LIMITS.passages
        page = _fill_template(data)
        while len(page) > LIMITS.page_bytes and n_passages > 0:
            if len(data["prompts"]) > 1:
                data = {**data, "prompts": data["prompts"][:-1]}
            else:
                n_passages -= 1
                data = _with_passages(data, n_passages)
            page = _fill_template(data)
        if len(page) > LIMITS.page_bytes:
            raise CircuitError(
                f"the page would have {len(page):,} bytes; draw fewer edges by setting min_weight"
            )
        return page

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the page.

        Args:
            path: the file, *.html or *.htm, or a pipe or device.
            overwrite: whether a file with other contents is replaced.

        Raises:
            CheckpointError: if the file cannot be written.
            ConfigError: if the name does not end in .html or .htm; or if there is a file with
                other contents, and `overwrite` is False.
        """
        check_ending(path, PAGE_ENDINGS, "a page")
        write_text(path, self.html, overwrite)

    def _repr_html_(self) -> str:
        # In its own sandbox, the page can neither read the notebook nor be styled by it.
        source = html.escape(self.html)
        style = "width:100%;height:900px;border:0"
        attributes = f'sandbox="allow-scripts" title="circuit" style="{style}"'
        return f'<iframe {attributes} srcdoc="{source}"></iframe>'


def _with_passages(data: dict[str, Any], n_passages: int) -> dict[str, Any]:
    """The data with at most `n_passages` passages of either sign for each node."""
    nodes = []
    for node in data["nodes"]:
        positive, negative = node["passages"]
        nodes.append({**node, "passages": [positive[:n_passages], negative[:n_passages]]})
    caps = {**data["caps"], "passages": n_passages}
    return {**data, "nodes": nodes, "caps": caps}


def _fill_template(data: dict[str, Any]) -> str:
    """The HTML of a page with these contents.

    The contents are written in ASCII and without `<`, so that no text from a model or a corpus can
    close the element that contains it.
    """
    parts = {}
    for name in ("page.css", "d3.min.js", "page.js", "template.html"):
        parts[name] = Path(__file__).with_name(name).read_text(encoding="utf-8")
    # A second safeguard: the content security policy lets only these two scripts run, and forbids
    # all requests.
    parts["scripts"] = f"{_digest(parts['d3.min.js'])} {_digest(parts['page.js'])}"
    task = data["summary"]["task"] or "A circuit"
    model = data["summary"]["model"] or "a model"
    parts["title"] = html.escape(f"{task} in {model}")
    # JSON has no NaN or infinity, so both are replaced with null.
    finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
    parts["data"] = json.dumps(finite, separators=(",", ":")).replace("<", "\\u003c")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], parts["template.html"])


def _digest(script: str) -> str:
    """The hash by which the content security policy identifies a script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest())
    return f"'sha256-{digest.decode()}'"

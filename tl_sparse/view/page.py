"""A circuit as one self-contained HTML page."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tl_sparse.errors import CircuitError
from tl_sparse.files import write_text
from tl_sparse.outputs import check_ending
from tl_sparse.view.limits import LIMITS, PAGE_ENDINGS

#: The folder of what a page consists of beside its contents.
WEB = Path(__file__).with_name("web")
#: The scripts of a page, in the order in which they are run.
SCRIPTS = (
    "text.js",
    "graph.js",
    "state.js",
    "labels.js",
    "layout.js",
    "drawing.js",
    "captions.js",
    "lighting.js",
    "panel.js",
    "edges.js",
    "evidence.js",
    "prompts.js",
    "curve.js",
    "heading.js",
    "explanation.js",
    "program.js",
    "certificate.js",
    "download.js",
    "controls.js",
)


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
    # JSON has no NaN or infinity, so both are replaced with null.
    finite = json.loads(json.dumps(data), parse_constant=lambda _: None)
    task = data["summary"]["task"] or "A circuit"
    model = data["summary"]["model"] or "a model"
    parts = {
        "title": html.escape(f"{task} in {model}"),
        "identity": _identity(finite),
        "data": json.dumps(finite, separators=(",", ":")).replace("<", "\\u003c"),
        "page.css": _source("page.css"),
        "d3.min.js": _source("d3.min.js"),
        "script": _script(),
    }
    parts["policy"] = _policy([parts["d3.min.js"], parts["script"]])
    template = _source("template.html")
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], template)


def _source(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def _script() -> str:
    """The scripts of the page as one, whose names do not become names of the window."""
    sources = [_source(name) for name in SCRIPTS]
    return "\n".join(['"use strict";', "(() => {", *sources, "})();", ""])


def _policy(scripts: Sequence[str]) -> str:
    """The content security policy.

    It is a second safeguard: only these scripts run, and nothing is requested. The graph becomes a
    PNG file by way of an image whose address is its contents.
    """
    digests = []
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest())
        digests.append(f"'sha256-{digest.decode()}'")
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src {' '.join(digests)}"
    )


def _identity(data: dict[str, Any]) -> str:
    """What the labels that a browser keeps belong to: the same model, task, nodes and edges."""
    summary = data["summary"]
    names = [node["name"] for node in data["nodes"]]
    contents = json.dumps([summary["model"], summary["task"], names, data["edges"]])
    return hashlib.sha256(contents.encode()).hexdigest()[:16]

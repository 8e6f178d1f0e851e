"""The pages of a collector as HTML: what it has, and where a person gives the key.

Names come from whoever uploads, and are text here, never markup. There is no script; the policy that goes
with a page allows its own style and its own forms, nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

from ml_debugger.store import layout

_SHOWN_EPOCHS = 12
_COLUMNS = ("model", "version", "epochs", "rows", "labelled", "size", "last sync", "download")
_NUMBERS = ("rows", "labelled", "size")
_NUMBER = ' class="n"'
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--faint:#5b6575;--line:#dde2ea;--back:#fff;--band:#f5f7fa;
--accent:#1a5fb4;--on-accent:#fff;--wrong:#a8201a}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7ee;--faint:#9aa5b5;--line:#39414f;--back:#171b22;
--band:#1f252f;--accent:#8ab8f5;--on-accent:#10151c;--wrong:#ff9d96}}
body{font:16px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:76rem;
margin:0 auto;padding:1.5rem 1rem 3rem}
header{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;align-items:baseline;margin-bottom:1.2rem}
h1{font-size:1.5rem;margin:0;flex:1 1 auto}p{margin:.3rem 0}.faint{color:var(--faint)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.5rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-size:.85rem;color:var(--faint);font-weight:600;white-space:nowrap}
td:nth-child(1){overflow-wrap:anywhere;min-width:7rem}td:nth-child(2){overflow-wrap:anywhere}
tbody tr:hover{background:var(--band)}time span{white-space:nowrap}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
@media(max-width:52rem){thead{display:none}table,tbody{display:block}
tr{display:grid;border-bottom:1px solid var(--line);padding:.6rem 0}
td{border:0;padding:.1rem .3rem;display:grid;grid-template-columns:6rem minmax(0,1fr);text-align:left}
td::before{content:attr(data-name);color:var(--faint)}td.n{text-align:left}}
a{color:var(--accent)}form.sign-in{max-width:24rem;margin:12vh auto 0;padding:1.5rem;background:var(--band);
border:1px solid var(--line);border-radius:.5rem}
label{display:block;margin:1rem 0 .3rem;font-weight:600}
input,button{font:inherit;padding:.5rem .7rem;border-radius:.3rem;border:1px solid var(--faint)}
input{width:100%;box-sizing:border-box;color:inherit;background:var(--back)}
button{color:var(--on-accent);background:var(--accent);border-color:var(--accent);cursor:pointer}
form.sign-in button{width:100%;margin-top:1rem}
header button{padding:.1rem .6rem;color:var(--accent);background:none}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}.wrong{color:var(--wrong)}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@dataclass
class TraceSummary:
    """What the collector has of one (model, version), as the names of its slices tell."""

    path: str
    model_name: str
    version_name: str
    epochs: set[int] = field(default_factory=set)
    ranks: set[str] = field(default_factory=set)
    rows: int = 0
    ground_truth_rows: int = 0
    length_bytes: int = 0
    last_sync: datetime | None = None


def traces_page(traces: Sequence[TraceSummary], *, can_sign_out: bool) -> str:
    """The page that lists what there is.

    Args:
        traces: In the order in which they are shown.
        can_sign_out: Whether the reader came in by the sign-in page.
    """
    rows = sum(trace.rows for trace in traces)
    size = _size(sum(trace.length_bytes for trace in traces))
    counted = f"{_counted(len(traces), 'trace')}, {_counted(rows, 'row')}, {size}"
    sign_out = '<form method="post" action="sign-out"><button>Sign out</button></form>'
    header = f'<h1>Collected traces</h1><span class="faint">{counted}</span>{sign_out * can_sign_out}'
    if not traces:
        return _document(
            f"<header>{header}</header><p>Nothing has been uploaded yet.</p>"
            '<p class="faint">A tracer uploads here when this address is its <code>api_endpoint</code>.</p>'
        )
    heads = "".join(f'<th scope="col"{_NUMBER * (name in _NUMBERS)}>{name}</th>' for name in _COLUMNS)
    return _document(
        f"<header>{header}</header><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(map(_row, traces))}</tbody></table>"
    )


def sign_in_page(*, was_wrong: bool) -> str:
    """The page that asks for a key; ``was_wrong``: the one that was just given is none."""
    wrong = '<p class="wrong" role="alert">This is not a key of this collector.</p>'
    return _document(
        '<form class="sign-in" method="post" action="sign-in"><h1>ml-debugger collector</h1>'
        # Managers of passwords file a key under a name.
        '<input name="user" value="ml-debugger" autocomplete="username" hidden>'
        '<label for="key">API key</label><input id="key" name="key" type="password" '
        f'autocomplete="current-password" required autofocus>{wrong * was_wrong}<button>Sign in</button>'
        '<p class="faint">The key that tracers show here, as <code>api_key</code> or '
        "<code>MLD_API_KEY</code>.</p></form>"
    )


def _document(body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>ml-debugger collector</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _row(trace: TraceSummary) -> str:
    ranks = "" if len(trace.ranks) < 2 else f' <span class="faint">({len(trace.ranks)} ranks)</span>'
    cells = (
        _name(trace.model_name),
        _name(trace.version_name),
        _epochs(trace.epochs) + ranks,
        f"{trace.rows:,}",
        f"{trace.ground_truth_rows:,}",
        _size(trace.length_bytes),
        _time(trace.last_sync),
        f'<a href="export/{html.escape(trace.path)}.zip" download>export</a>',
    )
    named = zip(_COLUMNS, cells, strict=True)
    shown = (
        f'<td data-name="{name}"{_NUMBER * (name in _NUMBERS)}><div>{cell}</div></td>' for name, cell in named
    )
    return f"<tr>{''.join(shown)}</tr>"


def _epochs(epochs: set[int]) -> str:
    listed = sorted(epochs - {layout.NO_EPOCH})
    is_row = len(listed) > 2 and listed[-1] - listed[0] == len(listed) - 1
    if is_row:
        shown = f"{listed[0]}–{listed[-1]}"
    else:
        shown = ", ".join(map(str, listed[:_SHOWN_EPOCHS])) + (", …" if len(listed) > _SHOWN_EPOCHS else "")
    return ", ".join(filter(None, ["none" if layout.NO_EPOCH in epochs else "", shown]))


def _name(name: str) -> str:
    """A name as text that changes nothing around it: no markup, no control characters, its own direction."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return f"<bdi>{html.escape(printable)}</bdi>"


def _time(moment: datetime | None) -> str:
    if moment is None:
        return ""
    utc = moment.astimezone(timezone.utc)
    shown = f"<span>{utc:%Y-%m-%d}</span> <span>{utc:%H:%M:%S} UTC</span>"
    return f'<time datetime="{utc:%Y-%m-%dT%H:%M:%SZ}">{shown}</time>'


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _size(length_bytes: int) -> str:
    size = float(length_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"

"""The results as one HTML page that needs no network and no other file."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tasks</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 12px; white-space: nowrap }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dd { margin: 0; overflow-wrap: anywhere }
</style>
</head>
<body>
<h1>Tasks</h1>
<dl>{% for key, value in facts.items() %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<ul>{% for section in sections %}
<li><a href="#{{ section.name }}">{{ section.title }}</a></li>{% endfor %}
</ul>
{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.title }}</h2>
<p>{{ section.shows }}</p>
<img alt="{{ section.title }}" src="data:image/svg+xml;base64,{{ images[section.name] }}">
{% for title, heads, lines in section.tables %}
<h3>{{ title }}</h3>
<div class="wide"><table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for line in lines %}
<tr>{% for cell in line %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
{% endfor %}
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}
</body>
</html>
"""


def render(
    facts: Mapping[str, Any],
    sections: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Figure],
    notes: Sequence[str],
) -> str:
    """The page; whatever a document's or a model's name holds is shown as text.

    Args:
        facts: what was run.
        sections: of each task its name, title, what it shows, and tables (title, headings, lines).
        figures: by task, its plot.
        notes: sentences at the end.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    images = {name: _svg(figure) for name, figure in figures.items()}
    template = environment.from_string(TEMPLATE)
    return template.render(facts=facts, sections=sections, images=images, notes=notes)


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    # No time stamp: the same figures give the same page.
    figure.savefig(file, format="svg", metadata={"Date": None})
    return b64encode(file.getvalue()).decode("ascii")

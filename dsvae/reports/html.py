"""report.html: one file that shows a whole evaluation and loads nothing from elsewhere."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dsvae.files import write_text
from dsvae.metrics.evaluate import Measured
from dsvae.reports.plots import plots
from dsvae.reports.sentences import Sentences
from dsvae.reports.table import number, sections

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ m.model }} on {{ m.source }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1120px;
      margin: 2rem auto; padding: 0 1.5rem; }
  h1 { font-size: 1.5rem; margin-bottom: .2rem; }
  h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dee4;
      padding-bottom: .2rem; }
  h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; }
  .about { color: #57606a; margin: 0; }
  .warning { background: #fff8c5; border-left: 4px solid #d4a72c; padding: .5rem .8rem;
      margin: .8rem 0; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr));
      gap: 1rem 2rem; }
  figure { margin: 0; max-width: 620px; } figure img { width: 100%; }
  figcaption { font-weight: 600; font-size: .95rem; }
  table { border-collapse: collapse; width: 100%; font-size: .88rem; }
  td, th { padding: .2rem .5rem .2rem 0; text-align: left; vertical-align: top;
      border-bottom: 1px solid #eaeef2; }
  td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
  .measured td.name { width: 11rem; } .measured td.n { width: 5rem; }
  .measured td.se { width: 6rem; } .measured td.unit { width: 8rem; }
  td.name, code { font-family: ui-monospace, monospace; font-size: .85em; }
  td.se, td.unit { color: #57606a; white-space: nowrap; }
  .text td { width: 50%; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ m.model }}</h1>
<p class="about">{{ m.source }}: {{ "{:,}".format(m.sentences) }} sentences &middot;
{{ m.latent_dim }} units of z
&middot; {{ m.evaluator }}, {{ m.precision }} &middot; means over sentences &plusmn;
standard errors</p>
{% for warning in m.warnings %}<p class="warning">{{ warning }}</p>{% endfor %}

<h2>Measured</h2>
{% for title, rows in sections %}<h3>{{ title }}</h3>
<table class="measured">
{% for row in rows %}<tr><td class="name">{{ row.name }}</td><td class="n">{{ row.value }}</td>
<td class="se">{% if row.error %}&plusmn; {{ row.error }}{% endif %}</td>
<td class="unit">{{ row.unit }}</td><td>{{ row.meaning }}</td></tr>
{% endfor %}</table>
{% endfor %}
{% if m.disentanglement %}
<h3>Disentanglement by factor</h3>
<p class="about">Of the posterior means; in brackets of the draws, and by chance.</p>
{% set per_factor = m.disentanglement.per_factor %}
{% set factor_columns = (per_factor.values() | first).keys() %}
<table><tr><th>factor</th>{% for name in factor_columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for factor, row in per_factor.items() %}<tr><td class="name">{{ factor }}</td>
{% for name in factor_columns %}<td>{{ number(row[name]) }}
({{ number(m.disentanglement.draws.per_factor[factor][name]) }},
{{ number(m.disentanglement.chance.per_factor[factor][name]) }})</td>{% endfor %}</tr>
{% endfor %}</table>
{% endif %}

<h2>Plots</h2>
<div class="plots">
{% for title, image in plots.items() %}<figure><figcaption>{{ title }}</figcaption>
<img alt="{{ title }}" src="data:image/svg+xml;base64,{{ image }}"></figure>
{% endfor %}</div>

{% if pairs %}<h2>Reconstructions</h2>
<p class="about">Greedy, from the posterior mean. The sentences are selected by hash, not
by eye.</p>
<table class="text"><tr><th>sentence</th><th>reconstruction</th></tr>
{% for sentence, reconstruction in pairs %}<tr><td>{{ sentence }}</td>
<td>{{ reconstruction }}</td></tr>
{% endfor %}</table>{% endif %}
{% if prior %}<h2>From the prior</h2>
<p class="about">Greedy, with z drawn from the prior.</p>
<ol>{% for sentence in prior %}<li>{{ sentence }}</li>{% endfor %}</ol>{% endif %}

<h2>How it was counted</h2>
<table>
{% for name, meaning in m.estimators.items() %}<tr><td class="name">{{ name }}</td>
<td>{{ meaning }}</td></tr>
{% endfor %}{% for name, meaning in m.policies.items() %}<tr><td>{{ name }}</td>
<td>{{ meaning }}</td></tr>
{% endfor %}{% if m.bleu_signature %}<tr><td>sacrebleu</td>
<td><code>BLEU {{ m.bleu_signature }}</code><br><code>chrF {{ m.chrf_signature }}</code></td>
</tr>{% endif %}
</table>
</body>
</html>
"""


def write_report(
    path: Path,
    metrics: dict[str, Any],
    measured: Measured,
    text: Sentences,
    pairs: list[tuple[str, str]],
    prior: list[str],
) -> None:
    """Writes the report of an `Evaluation`, whole or not at all."""
    images = {
        title: base64.b64encode(svg.encode()).decode()
        for title, svg in plots(metrics, measured, text).items()
    }
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE)
    html = template.render(
        m={"disentanglement": None, "bleu_signature": None, **metrics},
        sections=list(sections(metrics)),
        plots=images,
        pairs=pairs,
        prior=prior,
        number=number,
    )
    write_text(path, html)

"""The page of an evaluation: one file, nothing loaded from elsewhere."""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 78rem; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; }
h1, h3, p { overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.6rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1.02rem; margin-top: 1.6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.6rem 0; }
th, td { text-align: left; padding: 0.25rem 0.9rem 0.25rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #999; }
td.number, th.number { text-align: right; }
.wide td, .wide .number { white-space: nowrap; }
.wide.grouped td:first-child { white-space: normal; min-width: 8rem; }
tr.first td { border-top: 1px solid #bbb; }
.quiet { color: #666; }
.warning { background: #fff4d6; border-left: 4px solid #d9a400; padding: 0.5rem 0.9rem; }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; }
.example { border: 1px solid #ddd; border-radius: 6px; padding: 0.8rem 1rem; margin: 0.9rem 0; }
.example img { height: 7.2rem; border-radius: 3px; margin-right: 4px; }
.example svg { display: block; margin: 0.4rem 0; max-width: 100%; }
.answer { font-family: ui-monospace, monospace; white-space: pre-wrap; }
.legend td:nth-child(2), .legend td:nth-child(3) { overflow-wrap: anywhere; }
@media (max-width: 44rem) {
  body { font-size: 16px; margin: 0.8rem auto; padding: 0 0.8rem; }
  figure { overflow-x: auto; }
  figure svg { max-width: none; width: 35rem; }
  .example img { height: auto; width: calc(50% - 6px); }
  /* A row becomes a block, each value beside the name of its column: nothing to scroll sideways. */
  .rows tr { display: block; border-bottom: 1px solid #bbb; padding: 0.3rem 0; }
  .rows tr:first-child { display: none; }
  .rows td, .rows td.number { display: flex; gap: 0.6rem; text-align: left; white-space: normal; border: 0;
    padding: 0.05rem 0; }
  .rows td:empty { display: none; }
  .rows td::before { content: attr(data-name); flex: 0 0 8rem; color: #666; }
  .rows tr.first td { border-top: 0; }
  .rows td.group { font-weight: 600; }
  .rows td.group::before { display: none; }
}
.right { color: #00664b; } .wrong { color: #a33a00; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="quiet">{{ model }} · fmd_ext {{ version }}</p>
{% if random %}<p class="warning">This model's weights are random: the figures show that the evaluation works, and say
nothing about any method.</p>{% endif %}
{% for line in evaluation.counts.lines() %}
<p{% if not loop.first or evaluation.counts.failed %} class="warning"{% endif %}>{{ line }}</p>
{% endfor %}
{% for line in readings %}
<p{% if loop.first and evaluation.protocol != "ours" %} class="warning"{% endif %}>{{ line }}</p>
{% endfor %}
<div class="legend"><table class="rows"><tr><th>method</th><th>in full</th><th>settings in force</th>
<th>cost</th></tr>
{% for name, method, values, cost in legend %}<tr><td class="group">{{ name }}</td>
<td data-name="in full">{{ method }}</td>
<td data-name="settings">{{ values }}</td><td data-name="cost">{{ cost }}</td></tr>
{% endfor %}</table></div>
{% if notes %}
<h2>What the model did not get, or did not finish</h2>
<div class="wide"><table class="rows"><tr><th>answers with</th>{% for name in names %}
<th class="number">{{ name }}</th>{% endfor %}</tr>
{% for kind, counts in notes %}<tr><td class="group">{{ kind }}</td>{% for count in counts %}
<td class="number" data-name="{{ names[loop.index0] }}">{{ count }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="quiet">predictions.jsonl says for each answer how many frames and seconds the model got, and what each note is
about.</p>
{% endif %}
{% if tables %}
<h2>Accuracy</h2>
<p>Intervals are 95 %, with the questions about one video as a cluster. Differences are of the same questions, in pairs;
p is of a test that flips the sign of whole videos, and a star marks what stays below 5 % after Holm's correction within
its table. Answers that cannot be parsed count as wrong, and are shown apart.</p>
{% for table in tables %}
<h3>{{ table.title }}</h3>
{% for figure in table.figures %}<figure>{{ figure }}</figure>{% endfor %}
<div class="wide grouped"><table class="rows">
<tr><th></th><th class="number">items</th><th class="number">videos</th><th>method</th><th>accuracy, %</th>
<th>against {{ baseline }}</th><th class="number">unparsed, %</th></tr>
{% for row in table.rows %}<tr{% if row.first %} class="first"{% endif %}><td class="group">{{ row.group }}</td>
<td class="number" data-name="items">{{ row.num_items }}</td><td class="number" data-name="videos">{{ row.videos }}</td>
<td data-name="method">{{ row.method }}</td><td data-name="accuracy, %">{{ row.accuracy }}</td>
<td data-name="against {{ baseline }}">{{ row.against }}</td>
<td class="number" data-name="unparsed, %">{{ row.unparsed }}</td></tr>
{% endfor %}</table></div>
{% endfor %}
{% if averages %}<h3>Means over groups</h3>
<div class="wide"><table><tr><th>mean over</th><th>method</th><th>accuracy, %</th></tr>
{% for category, method, value in averages %}<tr><td>{{ category }}</td><td>{{ method }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div>{% endif %}
{% if yes_no %}<h3>Questions with "yes" or "no"</h3>
<div class="wide grouped"><table class="rows"><tr>{% for name in yes_no_names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in yes_no %}<tr{% if row[0] %} class="first"{% endif %}>
{% for value in row %}<td{% if loop.first %} class="group"{% endif %} data-name="{{ yes_no_names[loop.index0] }}">
{{- value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endif %}
{% if power %}<h3>What could have been seen</h3>
<div class="wide"><table><tr><th>method</th><th>gain that this evaluation shows (80 % power)</th>
{% for gain in gains %}<th>items for {{ gain }} points</th>{% endfor %}</tr>
{% for row in power %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="quiet">From the share of answers in which the methods differ here, and how much the questions of one video go
together. A dash: methods that differ so rarely cannot gain so much.</p>{% endif %}
{% endif %}
{% if evaluation.captions %}
<h2>Captions</h2>
<div class="wide"><table class="rows"><tr><th>method</th><th>metric</th><th>score of all, mean of each</th>
<th>against {{ baseline }}</th></tr>
{% for method, metric, score, difference in captions %}<tr><td class="group">{{ method }}</td>
<td data-name="metric">{{ metric }}</td><td data-name="score">{{ score }}</td>
<td data-name="against {{ baseline }}">{{ difference }}</td></tr>
{% endfor %}</table></div>
<p class="quiet">The score of all captions together is what papers give. Interval, difference and test are of the
captions' own scores, with the video as a cluster.</p>
{% endif %}
{% if speed or run_speed %}<h2>Speed</h2>{% endif %}
{% if speed %}
<p>{{ speed.num_items }} prompts of about {{ speed.prompt_tokens }} tokens, {{ speed.tokens }} new tokens each, one
prompt at a time, methods in turn. Ratios are medians over prompts with quartiles, over cached {{ baseline }}
decoding.</p>
<div class="wide"><table>
<tr><th>method</th><th class="number">first token</th><th>ratio</th><th class="number">tokens/s after it</th>
<th>ratio</th><th class="number">peak memory</th></tr>
{% for row in speed.rows %}<tr><td>{{ row[0] }}</td><td class="number">{{ row[1] }}</td><td>{{ row[2] }}</td>
<td class="number">{{ row[3] }}</td><td>{{ row[4] }}</td><td class="number">{{ row[5] }}</td></tr>
{% endfor %}</table></div>
{% endif %}
{% if run_speed %}<p>In the run itself, medians:</p>
<div class="wide"><table>
<tr><th>method</th><th class="number">first token</th><th class="number">over {{ baseline }}</th>
<th class="number">seconds per answer</th><th class="number">tokens per answer</th></tr>
{% for row in run_speed %}<tr><td>{{ row[0] }}</td>{% for value in row[1:] %}<td class="number">{{ value }}</td>
{% endfor %}</tr>{% endfor %}</table></div>{% endif %}
{% if examples %}
<h2>Answers that flip</h2>
{% for method in examples %}
<h3>{{ method.name }} against {{ baseline }}: {{ method.gained }} gained, {{ method.lost }} lost</h3>
{% for example in method.shown %}
<div class="example">
<p><strong>{{ example.verdict }}</strong> <span class="quiet">{{ example.id }}
{%- for name, value in example.categories %} · {{ name }}: {{ value }}{% endfor %}</span></p>
{% if example.frames %}<div>{% for frame in example.frames %}
<img alt="frame {{ loop.index }} of the clip" src="{{ frame }}">{% endfor %}</div>{% endif %}
{% if example.waveform %}{{ example.waveform }}{% endif %}
{% if example.note %}<p class="quiet">{{ example.note }}</p>{% endif %}
<p class="answer">{{ example.prompt }}</p>
<table><tr><th>right answer</th><td class="answer">{{ example.answer }}</td></tr>
{% for name, text, correct in example.said %}<tr><th>{{ name }}</th>
<td class="answer {{ 'right' if correct else 'wrong' }}">{{ text }}</td></tr>
{% endfor %}</table>
</div>
{% endfor %}
{% endfor %}
{% endif %}
<h2>How it was run</h2>
<pre>{{ settings }}</pre>
</body>
</html>
"""

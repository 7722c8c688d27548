"""How the HTML page looks."""

STYLE = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --red: #c62828; --green: #2e7d32; --blue: #1565c0; }
@media (prefers-color-scheme: dark) { :root { --red: #ef7070; --green: #7bc67e; --blue: #6fb1f5; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; }
main { max-width: 1100px; margin: 0 auto; padding: 1rem 1.5rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 .3rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
p { margin: .2rem 0; }
section { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.summary { border-left: 5px solid var(--line); background: var(--soft); padding: .7rem 1rem;
  margin-bottom: 1rem; overflow-wrap: anywhere; }
.summary.bad { border-color: var(--red); }
.summary.good { border-color: var(--green); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; }
th, td { padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
a { color: inherit; }
.fault, .note { border-radius: 4px; padding: 0 .4em; font-size: .8rem; font-weight: 600; color: var(--red);
  border: 1px solid; }
.note { color: var(--blue); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .4rem 0 .8rem; }
dt { opacity: .65; }
dd { margin: 0; }
.cases { display: flex; flex-wrap: wrap; gap: .8rem; }
.case { background: var(--soft); border-radius: 6px; padding: .5rem; font-size: .8rem; max-width: 100%; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem; }
figure { margin: 0; width: min-content; min-width: 180px; }
figcaption, .case p { overflow-wrap: anywhere; }
.case p { max-width: 30rem; opacity: .75; }
img { display: block; max-width: 180px; min-width: 96px; image-rendering: pixelated; margin-bottom: .2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 1.5rem; }
.charts td:first-child { white-space: nowrap; max-width: 9rem; overflow: hidden; text-overflow: ellipsis; }
.charts td { border: 0; padding-top: 0; padding-bottom: 0; }
.bar { width: 60%; }
.bar div { background: var(--blue); height: .8em; margin-top: .35em; border-radius: 2px; min-width: 1px; }
footer { opacity: .65; font-size: .85rem; }
"""

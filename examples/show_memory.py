r"""Draw what a model remembers of a page: which tokens each layer's eidetic memory keeps, and for how long.

Commands:

    python examples/show_memory.py --output memory.html
    python examples/show_memory.py --text story.txt --tokens 3000 --output story.html --png story.png

The model reads the text once. The HTML file, which needs nothing beside it, shows the text with every token tinted by its
innovation, that is by how far it (or what the SSM says of it) lies from what the tokens before predict; the tokens in
memory stand out. A slider goes through the chunks of the text and shows the memory as it was when each was answered; the
strips beside the text show the lives of all kept tokens, layer by layer. --png draws the page and the strips as an image,
where matplotlib is installed.

Without --text it reads the beginning of a validation book of PG-19 where ../shared/data/pg19 is, else a passage by
Jane Austen.
"""

import argparse
import html
import io
import json
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from common import ROOT, check_numbers, load_model, read_text


BOOK = ROOT.parent / "shared" / "data" / "pg19" / "validation" / "555.txt.gz"
PASSAGE = """PRIDE AND PREJUDICE

Chapter 1

It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other
of their daughters.

"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?"

Mr. Bennet replied that he had not.

"But it is," returned she; "for Mrs. Long has just been here, and she told me all about it."

Mr. Bennet made no answer.

"Do not you want to know who has taken it?" cried his wife impatiently.

"You want to tell me, and I have no objection to hearing it."

This was invitation enough.

"Why, my dear, you must know, Mrs. Long says that Netherfield is taken by a young man of large fortune from the north of
England; that he came down on Monday in a chaise and four to see the place, and was so much delighted with it that he
agreed with Mr. Morris immediately; that he is to take possession before Michaelmas, and some of his servants are to be in
the house by the end of next week."

"What is his name?"

"Bingley."

"Is he married or single?"

"Oh! single, my dear, to be sure! A single man of large fortune; four or five thousand a year. What a fine thing for our
girls!"

"How so? how can it affect them?"

"My dear Mr. Bennet," replied his wife, "how can you be so tiresome! You must know that I am thinking of his marrying one
of them."

"Is that his design in settling here?"

"Design! nonsense, how can you talk so! But it is very likely that he may fall in love with one of them, and therefore you
must visit him as soon as he comes."
"""


@dataclass
class Layer:
    """What a layer remembers of a text.

    Attributes:
        number: of the layer in the model.
        innovations: one of every token.
        ranks: how many of a hundred tokens of the text have a smaller innovation.
        lives: of every token that was ever in memory its position, and the first and the last chunk that saw it there.
    """

    number: int
    innovations: list[float]
    ranks: list[int]
    lives: list[tuple[int, int, int]]

    def memory(self, chunk: int) -> list[int]:
        """Positions in memory when a chunk was answered, in ascending order."""
        return [position for position, first, last in self.lives if first <= chunk <= last]


@dataclass
class Reading:
    """A text as a model read it.

    Attributes:
        title: of the text.
        tokens: the text in pieces, one for each token. Joined, they are the text; one that ends within a character is "".
        layers: those with an eidetic memory.
        window, chunk, size: sliding_window, eidetic_chunk_size and eidetic_size of the model.
    """

    title: str
    tokens: list[str]
    layers: list[Layer]
    window: int
    chunk: int
    size: int

    @property
    def chunks(self) -> int:
        return -(-len(self.tokens) // self.chunk)


def find_lives(memories: torch.Tensor) -> list[tuple[int, int, int]]:
    """From the memories of all chunks (chunks, eidetic_size), -1 for empty places, to `Layer.lives`, in ascending order.

    A token enters once and never returns, so the chunks that see it are neighbours.
    """
    lives = {}
    for chunk, memory in enumerate(memories.tolist()):
        for position in memory:
            if position >= 0:
                first, _ = lives.get(position, (chunk, chunk))
                lives[position] = (first, chunk)
    return [(position, *life) for position, life in sorted(lives.items())]


@torch.inference_mode()
def read(model, tokenizer, text: str, title: str, count: int) -> Reading:
    """Let a model read the first `count` tokens of a text.

    Raises:
        SystemExit: the text has no token, or the model no eidetic memory.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, ends = encoded["input_ids"][:count], [end for _, end in encoded["offset_mapping"][:count]]
    if not ids:
        raise SystemExit("The text is empty: name another with --text.")
    tokens = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    if model.config.model_type != "bmojo":
        raise SystemExit(f"The model is a {model.config.model_type}, no B'MOJO: there is no eidetic memory to show.")
    output = model(torch.tensor([ids], device=model.device), use_cache=False, output_eidetic=True, logits_to_keep=1)
    layers = []
    for number, (innovations, memories) in enumerate(zip(output.innovations, output.eidetic_positions, strict=True)):
        if memories is not None:
            ranks, lives = percent_ranks(innovations[0]), find_lives(memories[0])
            layers.append(Layer(number, innovations[0].tolist(), ranks, lives))
    if not layers:
        raise SystemExit("The model has no bmojo layer with an eidetic memory, so there is nothing to show.")
    config = model.config
    return Reading(title, tokens, layers, config.sliding_window, config.eidetic_chunk_size, config.eidetic_size)


def find_title(text: str) -> str:
    """The first line with something on it; a line in capitals as a title is written."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")[:80]
    return string.capwords(line) if line.isupper() else line


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


def split_paragraphs(tokens: list[str]) -> list[list[int]]:
    """The positions of the tokens, a new list where a word follows a blank line."""
    paragraphs, gap = [[]], None  # what is between the last word and the next; None before the first
    for position, token in enumerate(tokens):
        word = token.strip()
        if word:
            if gap is not None and (gap + token.partition(word)[0]).count("\n") > 1:
                paragraphs.append([])
            gap = token.rpartition(word)[2]
        elif gap is not None:
            gap += token
        paragraphs[-1].append(position)
    return paragraphs


def percent_ranks(values: torch.Tensor) -> list[int]:
    """How many of a hundred of the values (n,) are smaller than each; of equals, the earlier count as smaller."""
    order = values.double().argsort(stable=True).argsort()
    return (order * 100).div(len(values), rounding_mode="floor").tolist()


def overview(reading: Reading, chunk: int) -> tuple[list[int], list[float]]:
    """All layers together: the ranks of the tokens' mean ranks, and of every token the share of the layers that hold it."""
    ranks = percent_ranks(torch.tensor([layer.ranks for layer in reading.layers]).sum(0))
    held = [0.0] * len(reading.tokens)
    for layer in reading.layers:
        for position in layer.memory(chunk):
            held[position] += 1 / len(reading.layers)
    return ranks, held


def make_text(reading: Reading) -> str:
    """The paragraphs, a span for every token; as the slider's last chunk shows them, for readers without JavaScript."""
    ranks, held = overview(reading, reading.chunks - 1)

    def span(position: int) -> str:
        token = reading.tokens[position]
        word = token.strip()
        before, after = ("", "") if not word else (token[: token.index(word)], token[token.index(word) + len(word) :])
        classes = ["kept"] * (held[position] > 0) + ["deep"] * (held[position] > 0.5)
        classes += [] if word else ["line" if "\n" in token else "space"]
        of_class = f' class="{" ".join(classes)}"' if classes else ""
        style = f"--i:{ranks[position] / 100}" + (f";--k:{held[position]:.2f}" if held[position] else "")
        return f'{before}<span{of_class} style="{style}">{html.escape(word or token)}</span>{after}'

    paragraphs = ["".join(map(span, paragraph)) for paragraph in split_paragraphs(reading.tokens)]
    return "\n".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)


def window_of(reading: Reading, chunk: int) -> tuple[int, int]:
    """The tokens that the queries of a chunk see in their windows, (first, last + 1): the chunk's own among them."""
    begin = chunk * reading.chunk
    return max(0, begin - reading.window + 1), min(begin + reading.chunk, len(reading.tokens))


def make_strip(reading: Reading, layer: Layer) -> str:
    """The lives of a layer's tokens as SVG: time from left to right, positions from top to bottom."""
    length, step = len(reading.tokens), reading.chunk
    band = "".join(
        f"M{b * step},{first}H{last}V{last}H{b * step}z"
        for b in range(reading.chunks)
        for first, last in [window_of(reading, b)]
    )
    lives = "".join(f"M{first * step},{p + 0.5}H{min((last + 1) * step, length)}" for p, first, last in layer.lives)
    return (
        f'<svg viewBox="0 0 {length} {length}" preserveAspectRatio="none" aria-hidden="true"><path class="band" d="{band}"/>'
        f'<path class="lives" d="{lives}"/><path class="alive"/><path class="found"/><path class="cursor"/></svg>'
    )


def make_page(reading: Reading) -> str:
    """The HTML file."""
    data = {
        "tokens": len(reading.tokens),
        "window": reading.window,
        "chunk": reading.chunk,
        "size": reading.size,
        "ranks": overview(reading, 0)[0],
        "layers": [
            {"number": layer.number, "ranks": layer.ranks, "lives": layer.lives}
            | {"innovations": [float(f"{innovation:.3g}") for innovation in layer.innovations]}
            for layer in reading.layers
        ],
    }
    strips = "".join(
        f'<figure data-layer="{place}"><figcaption>layer {layer.number}<small>{len(layer.lives)} tokens kept for a '
        f"turn</small></figcaption>{make_strip(reading, layer)}</figure>"
        for place, layer in enumerate(reading.layers)
    )
    tabs = "".join(f'<button data-layer="{i}">layer {layer.number}</button>' for i, layer in enumerate(reading.layers))
    fields = {
        "title": html.escape(reading.title),
        "style": STYLE,
        "script": SCRIPT,
        "text": make_text(reading),
        "strips": strips,
        "tabs": tabs,
        "last": str(reading.chunks - 1),
        "window": str(reading.window),
        "size": str(reading.size),
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False),
    }
    return Page(PAGE).substitute(fields)


class Page(string.Template):
    delimiter = "%%"


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a memory keeps: %%{title}</title>
<style>%%{style}</style>
</head>
<body>
<header>
<nav><button data-layer="-1" class="on">all layers</button>%%{tabs}<button id="mode" title="light or dark">◐</button></nav>
<div class="time"><button id="play" title="play">▶</button>
<input id="chunk" type="range" min="0" max="%%{last}" value="%%{last}" aria-label="chunk of the text"><output id="when"></output></div>
<p id="about" aria-live="polite"></p>
</header>
<main>
<article>
<h1>%%{title}</h1>
<div class="legend"><span class="kept" style="--k:1">kept</span> in the eidetic memory of %%{size} places a layer
<span class="kept" style="--k:.25">pale</span> by few layers only <span style="--i:.97">tinted</span> surprising
<span class="window">underlined</span> in the window of %%{window} tokens <span class="ahead">grey</span> not read yet</div>
<div id="page">
%%{text}
</div>
</article>
<aside>
%%{strips}
<p>From left to right the text is read; from top to bottom lie its tokens. The band is the window. A line begins where a
token leaves the window and is kept, and ends where a more surprising one takes its place. Drag to go through time.</p>
</aside>
</main>
<script type="application/json" id="data">%%{data}</script>
<script>%%{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark;
  --paper: light-dark(#fcfaf4, #191817); --ink: light-dark(#29251f, #ddd8cd); --soft: light-dark(#857d70, #948d80);
  --rule: light-dark(#e4ddce, #37342f); --kept: light-dark(#0b7a75, #2bb8a8); --on-kept: light-dark(#fff, #0d1514);
  --heat: light-dark(#f0961e, #f5a032); --band: light-dark(#b9cfe8, #34506e); --now: light-dark(#3f74b3, #7fb0e6); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.06rem/1.62 "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif; }
header, figcaption, aside p, .legend { font-family: system-ui, sans-serif; font-size: .8rem; line-height: 1.5; }
header { position: sticky; top: 0; z-index: 1; padding: .6rem 1.5rem .35rem; background: var(--paper); border-bottom: 1px solid var(--rule); }
nav, .time { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center; }
button { font: inherit; color: var(--soft); background: none; border: 1px solid var(--rule); border-radius: 1rem;
  padding: .12rem .7rem; cursor: pointer; }
button:hover, button.on { color: var(--ink); border-color: var(--kept); }
button.on { background: var(--kept); color: var(--on-kept); }
#mode { margin-left: auto; }
.time { margin-top: .4rem; flex-wrap: nowrap; }
input { flex: 1; min-width: 8rem; accent-color: var(--kept); }
output { min-width: 19rem; color: var(--soft); font-variant-numeric: tabular-nums; }
#about { margin: .2rem 0 0; min-height: 1.3rem; color: var(--soft); white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
main { display: grid; grid-template-columns: minmax(0, 42rem) minmax(15rem, 24rem); gap: 3.5rem; justify-content: center; padding: 1.5rem; }
h1 { font-weight: 500; font-size: 2rem; line-height: 1.2; margin: .5rem 0 .6rem; text-wrap: balance; }
.legend { color: var(--soft); margin-bottom: 1.8rem; }
.legend span { margin-left: .55rem; color: var(--ink); }
.legend span:first-child { margin-left: 0; }
#page { hyphens: manual; }
#page p { margin: 0 0 .85em; }
article span { border-radius: .2em;
  background: color-mix(in srgb, var(--heat) calc(62% * var(--i, 0) * var(--i, 0) * var(--i, 0) * var(--i, 0)), transparent); }
article span.window { box-shadow: 0 .13em 0 var(--band); border-radius: 0; }
article span.now { box-shadow: 0 .13em 0 var(--now); }
article span.ahead { opacity: .3; background: none; }
article span.kept { background: color-mix(in oklab, var(--kept) calc(25% + 75% * var(--k)), transparent); padding: .09em 0; }
article span.kept.deep { color: var(--on-kept); }
article .legend span.kept:first-child { color: var(--on-kept); }
article span.space:not(.kept), article span.line:not(.kept) { background: none; }
.space.kept::after { content: "\\2423"; } .line.kept::after { content: "\\21b5"; }
#page span:empty.kept::after { content: "\\b7"; }
#page span:hover { outline: 1.5px solid var(--ink); }
aside { position: sticky; top: 8rem; align-self: start; }
figure { margin: 0 0 .8rem; cursor: pointer; }
figcaption { display: flex; justify-content: space-between; color: var(--ink); }
figcaption small { color: var(--soft); font-size: inherit; }
figure.on figcaption { color: var(--kept); font-weight: 600; }
svg { display: block; width: 100%; height: clamp(6rem, 16.5vh, 12rem); border: 1px solid var(--rule); border-radius: .3rem; touch-action: pan-y; }
svg path { fill: none; vector-effect: non-scaling-stroke; }
svg .band { fill: var(--band); opacity: .6; }
svg .lives { stroke: var(--kept); stroke-width: 1; opacity: .38; }
svg .alive { stroke: var(--kept); stroke-width: 1.2; }
svg .found { stroke: var(--heat); stroke-width: 3; }
svg .cursor { stroke: var(--ink); stroke-width: 1; }
aside p { color: var(--soft); }
@media (max-width: 60rem) { main { grid-template-columns: minmax(0, 42rem); } output { min-width: 0; }
  aside { position: static; order: -1; display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; } aside p { grid-column: 1 / -1; margin: 0; } }
@media print { header { display: none; } }
"""

SCRIPT = r"""
const data = JSON.parse(document.getElementById("data").textContent);
const spans = [...document.querySelectorAll("#page span")];
const slider = document.getElementById("chunk"), about = document.getElementById("about");
const figures = [...document.querySelectorAll("figure")], tabs = [...document.querySelectorAll("nav [data-layer]")];
let layer = -1, pending = false, timer = null;

const line = ([p, first, last]) => `M${first * data.chunk},${p + .5}H${Math.min((last + 1) * data.chunk, data.tokens)}`;
const alive = (lives, chunk) => lives.filter(([, first, last]) => first <= chunk && chunk <= last);

function show() {
  pending = false;
  const chunk = +slider.value, shown = layer < 0 ? data.layers : [data.layers[layer]];
  const begin = chunk * data.chunk, end = Math.min(begin + data.chunk, data.tokens);
  const held = new Array(data.tokens).fill(0), { ranks } = layer < 0 ? data : shown[0];
  for (const l of shown) for (const [p] of alive(l.lives, chunk)) held[p] += 1 / shown.length;
  spans.forEach((span, i) => {
    span.style.cssText = `--i:${ranks[i] / 100};--k:${held[i].toFixed(2)}`;
    span.classList.toggle("kept", held[i] > 0);
    span.classList.toggle("deep", held[i] > .5);
    span.classList.toggle("window", i > begin - data.window && i < end);
    span.classList.toggle("now", i >= begin && i < end);
    span.classList.toggle("ahead", i >= end);
  });
  figures.forEach((figure, i) => {
    const memory = alive(data.layers[i].lives, chunk), middle = (begin + end) / 2;
    figure.classList.toggle("on", i === layer);
    figure.querySelector(".alive").setAttribute("d", memory.map(line).join(""));
    figure.querySelector(".cursor").setAttribute("d", `M${middle},0V${data.tokens}`);
  });
  tabs.forEach(tab => tab.classList.toggle("on", +tab.dataset.layer === layer));
  const full = shown.map(l => alive(l.lives, chunk).length), most = Math.max(...full);
  document.getElementById("when").textContent =
    `tokens ${begin} to ${end - 1} of ${data.tokens} · ${most} of ${data.size} places taken`;
}

function update() { if (!pending) { pending = true; requestAnimationFrame(show); } }

function tell(i) {
  const shown = layer < 0 ? data.layers : [data.layers[layer]];
  const parts = shown.map(l => {
    const life = l.lives.find(([p]) => p === i);
    const kept = !life ? "not kept" : `kept from ${life[1] * data.chunk} ` +
      ((life[2] + 1) * data.chunk >= data.tokens ? "to the end" : `to ${(life[2] + 1) * data.chunk - 1}`);
    return `layer ${l.number}: innovation ${l.innovations[i]}, above ${l.ranks[i]} of 100, ${kept}`;
  });
  about.textContent = `token ${i} “${spans[i].textContent}” · ` + parts.join(" · ");
  figures.forEach((figure, f) => {
    const life = data.layers[f].lives.find(([p]) => p === i);
    figure.querySelector(".found").setAttribute("d", life ? line(life) : "");
  });
}

const number = new Map(spans.map((span, i) => [span, i]));
document.getElementById("page").addEventListener("pointerover", event => {
  if (number.has(event.target)) tell(number.get(event.target));
});
slider.addEventListener("input", update);
tabs.forEach(tab => tab.addEventListener("click", () => { layer = +tab.dataset.layer; update(); }));
figures.forEach((figure, i) => {
  figure.querySelector("figcaption").addEventListener("click", () => { layer = layer === i ? -1 : i; update(); });
  const svg = figure.querySelector("svg");
  const scrub = event => {
    const box = svg.getBoundingClientRect();
    slider.value = Math.floor((event.clientX - box.left) / box.width * data.tokens / data.chunk);
    update();
  };
  svg.addEventListener("pointerdown", event => { svg.setPointerCapture(event.pointerId); scrub(event); });
  svg.addEventListener("pointermove", event => { if (event.buttons) scrub(event); });
});
document.getElementById("play").addEventListener("click", event => {
  if (timer) { clearInterval(timer); timer = null; event.target.textContent = "▶"; return; }
  if (slider.value === slider.max) slider.value = 0;
  event.target.textContent = "❚❚";
  timer = setInterval(() => {
    slider.value = +slider.value + 1;
    update();
    if (slider.value === slider.max) document.getElementById("play").click();
  }, 350);
});
document.getElementById("mode").addEventListener("click", () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = (root.style.colorScheme || (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
});
show();
"""


# ----------------------------------------------------------------------------------------------------------------------
# The image
# ----------------------------------------------------------------------------------------------------------------------

PAPER, INK, SOFT, BAND, KEPT, HEAT = "#fcfaf4", "#29251f", "#857d70", "#cfdded", "#0b7a75", "#f0961e"


def set_lines(reading: Reading, width_of, width: float, indent: float) -> list[list[tuple[int, float, str]]]:
    """Break the text into lines: of every token its position, its place from the left, and what is to be printed.

    Args:
        reading: the text.
        width_of: the width of a string.
        width: of a line.
        indent: of a paragraph's first line.
    """
    lines, space = [], width_of(" ")
    for number, paragraph in enumerate(split_paragraphs(reading.tokens)):
        line, x, word = [], indent if number else 0.0, []

        def put():
            """End the word that is being collected."""
            nonlocal line, x, word
            needed = sum(width_of(text) for _, text in word)
            if needed and line and x + needed > width:
                lines.append(line)
                line, x = [], 0.0
            for position, text in word:
                line.append((position, x, text))
                x += width_of(text)
            word = []

        for position in paragraph:
            token = reading.tokens[position]
            if token[:1].isspace() or not token:
                put()
                x += space if line and token else 0
            word.append((position, " ".join(token.split())))
            if token.strip() and token[-1].isspace():
                put()
                x += space
        put()
        lines.append(line)
    return lines


def draw(reading: Reading, target: Path, columns: int = 2, width: float = 4.7, size: float = 7.5):
    """Draw the page as the last chunk leaves it, and the strips of all layers, `width` inches for each of the columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from PIL import Image  # comes with matplotlib

    figure = Figure(dpi=120, facecolor=PAPER)
    renderer = FigureCanvasAgg(figure).get_renderer()
    font = FontProperties(family="DejaVu Serif", size=size)
    known = {" ": 0.32 * size}

    def width_of(text: str) -> float:  # in points
        if text not in known:  # the advance, which the extent of the ink misses: that of two, less that of one
            one, two = (renderer.get_text_width_height_descent(f"|{text * n}|", font, False)[0] for n in (1, 2))
            known[text] = (two - one) * 72 / figure.dpi
        return known[text]

    lines = set_lines(reading, width_of, 72 * (width - 0.45), 1.6 * size)
    rows, leading = -(-len(lines) // columns), 1.62 * size
    top, side = 0.75, 4.6
    height = max(rows * leading / 72 + top + 0.35, 1.6 * len(reading.layers))
    total = columns * width + side
    figure.set_size_inches(total, height)
    page = figure.add_axes([0, 0, columns * width / total, 1])
    page.set(xlim=(0, 72 * columns * width), ylim=(72 * height, 0))
    page.axis("off")
    page.text(26, 34, reading.title, family="DejaVu Serif", fontsize=17, color=INK, parse_math=False)
    deeper = ", deeper where more layers hold it" if len(reading.layers) > 1 else ""
    legend = f"green: in memory at the end{deeper}\norange: surprising      underlined: in the window"
    edge = 72 * columns * width - 8
    page.text(edge, 34, legend, family="DejaVu Sans", fontsize=size, color=SOFT, ha="right", linespacing=1.5)
    placed = [
        (26 + 72 * width * (number // rows), 72 * top + leading * (number % rows + 0.7), line)
        for number, line in enumerate(lines)
    ]
    draw_text(page, reading, placed, font, width_of)

    room = (height - 0.75) / len(reading.layers)
    for row, layer in enumerate(reading.layers):
        bottom = height - 0.45 - (row + 1) * room + 0.42
        box = [(columns * width + 0.75) / total, bottom / height, (side - 1.1) / total, (room - 0.55) / height]
        draw_strip(figure.add_axes(box), reading, layer)
    target.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, dpi=figure.dpi, facecolor=PAPER)
    Image.open(image).convert("RGB").quantize(64).save(target, format="PNG", optimize=True)  # a third of the bytes


def draw_text(page, reading: Reading, placed: list[tuple[float, float, list]], font, width_of):
    """Print lines, each with its left edge and baseline in points, on axes: kept tokens boxed, surprising ones tinted."""
    from matplotlib.patches import FancyBboxPatch

    size = font.get_size()
    ranks, held = overview(reading, reading.chunks - 1)
    seen = window_of(reading, reading.chunks - 1)
    for left, baseline, line in placed:
        for position, x, text in line:
            depth = 0.25 + 0.75 * held[position] if held[position] else 0
            if not text and not depth:
                continue
            box = (left + x, baseline - 0.92 * size), width_of(text or " "), 1.22 * size
            if depth or ranks[position] > 40:
                colour, alpha = (KEPT, depth) if depth else (HEAT, 0.62 * (ranks[position] / 100) ** 4)
                rounded = "round,pad=0.25,rounding_size=1.2"
                page.add_patch(FancyBboxPatch(*box, boxstyle=rounded, facecolor=colour, alpha=alpha, linewidth=0))
            if seen[0] <= position < seen[1]:
                y = baseline + 0.3 * size
                page.plot([left + x, left + x + box[1]], [y, y], color="#7fa6d3", linewidth=1.4, solid_capstyle="butt")
            ink = "white" if depth > 0.6 else INK
            page.text(left + x, baseline, text, font=font, color=ink, parse_math=False)


def draw_strip(strip, reading: Reading, layer: Layer):
    """The lives of a layer's tokens on axes, as `make_strip` shows them."""
    from matplotlib.collections import LineCollection

    length, step = len(reading.tokens), reading.chunk
    bounds = [window_of(reading, b) for b in range(reading.chunks)]
    times = [step * b for b in range(reading.chunks)] + [length]
    strip.stairs([last for _, last in bounds], times, baseline=[first for first, _ in bounds], fill=True, color=BAND)
    for alive, strength in ((False, 0.35), (True, 1.0)):
        lives = [
            [(first * step, p), (min((last + 1) * step, length), p)]
            for p, first, last in layer.lives
            if (last == reading.chunks - 1) == alive
        ]
        strip.add_collection(LineCollection(lives, colors=KEPT, alpha=strength, linewidths=0.8))
    lowest = layer is reading.layers[-1]
    strip.set(xlim=(0, length), ylim=(length, 0), facecolor="white")
    strip.set_title(f"layer {layer.number}", loc="left", fontsize=9, color=INK)
    strip.set_title(f"{len(layer.lives)} held in turn", loc="right", fontsize=8, color=SOFT)
    strip.tick_params(labelsize=7, colors=SOFT, labelbottom=lowest)
    strip.spines[:].set_color("#e4ddce")
    strip.set_ylabel("position kept", fontsize=7.5, color=SOFT)
    if lowest:
        strip.set_xlabel("tokens read", fontsize=7.5, color=SOFT)


def main(argv: list[str] | None = None):
    """Read a text, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="folder or Hub id (default: this repository)")
    parser.add_argument(
        "--text", help="a .txt or .txt.gz file (default: a book of PG-19, or a passage by Jane Austen)"
    )
    parser.add_argument("--tokens", type=int, default=2000, help="how many to read, from the start (default 2000)")
    parser.add_argument("--output", default="memory.html", help="the page (default memory.html)")
    parser.add_argument("--png", help="also draw an image, to this file")
    options = parser.parse_args(argv)
    check_numbers(parser, options, tokens=1)
    if options.text and not Path(options.text).is_file():
        parser.error(f"there is no file {options.text}.")
    path = Path(options.text) if options.text else BOOK
    text = read_text(path) if path.is_file() else PASSAGE
    model, tokenizer = load_model(options.model)
    reading = read(model, tokenizer, text[: 40 * options.tokens], find_title(text), options.tokens)

    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(make_page(reading), encoding="utf-8")
    print(f"{output}: {len(reading.tokens)} tokens, {output.stat().st_size / 1000:.0f} kB")
    for layer in reading.layers:
        held = len(layer.memory(reading.chunks - 1))
        print(
            f"layer {layer.number}: {held} of {reading.size} places taken at the end, {len(layer.lives)} tokens held in turn"
        )
    if options.png:
        try:
            draw(reading, Path(options.png))
        except ImportError:
            print("No image was drawn: it needs matplotlib (pip install matplotlib).", file=sys.stderr)


if __name__ == "__main__":
    main()

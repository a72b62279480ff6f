"""One page about the heads of a model: roles, importance, ablation, clusters, what changed, and pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attn_callbacks.functional.role_labels import ROLE_LABELS
from attn_callbacks.render import Picture, diverging, sequential
from attn_callbacks.render.canvas import GREY, MARGIN
from attn_callbacks.render.clusters import cluster_colours
from attn_callbacks.render.matrix import draw_cells, shades
from attn_callbacks.render.roles import ABBREVIATIONS, role_colours
from examples.heads_page import CELL, GAP, HEAD, LABEL, LINE, TEXT, Page, legend, paled, thousandths

if TYPE_CHECKING:
    from examples.heads_of_minilm import Found, Look

__all__ = ["draw_page"]

FOOT, MOST_ROWS, PAIRS, MATRIX, BARS = 26, 10, 5, 520, 120


def draw_page(found: Found) -> Picture:
    """Draw everything that was found about the heads of a model."""
    layers, heads = found.looks[-1].roles.score.shape[:2]
    column = max(LABEL + heads * CELL[1], LABEL + MATRIX)
    panel = HEAD + layers * CELL[0] + FOOT
    present = [name for name in ROLE_LABELS if any(name in row for look in found.looks for row in look.roles.names())]
    width = 2 * column + GAP + 2 * MARGIN
    places = legend(present, width)
    top = MARGIN + 70 + LINE * (places[-1][1] + 1) + 14
    rows = _changed(found)
    low = top + 3 * panel
    lists = low + max(panel, HEAD + LINE * min(len(rows), MOST_ROWS) + FOOT)
    page = _Page(lists + HEAD + MATRIX + 2 * MARGIN, width, column)
    page.heading(found, present, places)
    for side, when, look in ((0, "before fine-tuning", found.looks[0]), (1, "after fine-tuning", found.looks[-1])):
        page.roles(top, side, when, look)
        page.importance(top + panel, side, when, found, look)
        page.ablation(top + 2 * panel, side, when, found, look)
    page.clusters(low, found.looks[-1])
    page.timeline(low, found, rows)
    page.pairs(lists, found)
    page.strongest(lists, found)
    return Picture(page.pixels)


class _Page(Page):
    """The panels, from top to bottom."""

    def roles(self, top: int, side: int, when: str, look: Look) -> None:
        """Draw what every head does."""
        left = self.panel(top, side, f"1  What each head does, {when}", "pale: not sure; colours as above")
        labels = look.roles.labels()
        numbers, sure = labels.label.numpy(), (labels.confidence >= 0.1).numpy()
        colours = paled(role_colours(numbers, ROLE_LABELS), sure)
        texts = [[ABBREVIATIONS.get(name, name[:5]) for name in row] for row in look.roles.names()]
        self.grid(top, left, colours, texts, numbers < 0)

    def importance(self, top: int, side: int, when: str, found: Found, look: Look) -> None:
        """Draw how strongly the loss answers to each head."""
        left = self.panel(
            top,
            side,
            f"2  How much the loss reacts to each head, {when}",
            "bright: it matters; numbers x 1000; the same colours on both sides",
        )
        values = look.study.importance.importance.numpy()
        high = max(float(np.nanmax(each.study.importance.importance.numpy())) for each in found.looks)
        self.grid(top, left, shades(values, 0.0, high, sequential()), thousandths(values), np.isnan(values))

    def ablation(self, top: int, side: int, when: str, found: Found, look: Look) -> None:
        """Draw what happens without each head."""
        caption = "brown: the loss rises, the head is of use; blue: it falls; * beyond two standard errors; x 1000"
        left = self.panel(top, side, f"3  What happens without each head, {when}", caption)
        values, errors = look.ablation.change.numpy(), look.ablation.standard_error.numpy()
        measured = [each.ablation.change.numpy() for each in found.looks if each.ablation is not None]
        high = max(float(np.nanmax(np.abs(each))) for each in measured)
        texts = [
            [text + "*" * bool(abs(value) > 2 * error) for text, value, error in zip(*row, strict=True)]
            for row in zip(thousandths(values), values, errors, strict=True)
        ]
        self.grid(top, left, shades(values, -high, high, diverging()), texts, np.isnan(values))

    def clusters(self, top: int, look: Look) -> None:
        """Draw which heads look at the same words."""
        found = look.clusters
        clear = "not clearly" if found.mean_silhouette < 0.25 else "clearly"
        caption = f"one colour, one cluster; they are {clear} apart (silhouette {found.mean_silhouette:.2f})"
        left = self.panel(top, 0, "4  Heads that look at the same words, after fine-tuning", caption)
        labels = found.labels.numpy()
        texts = [["" if each < 0 else chr(ord("A") + each) for each in row] for row in labels.tolist()]
        self.grid(top, left, cluster_colours(labels), texts, labels < 0)

    def timeline(self, top: int, found: Found, changed: Sequence[tuple[int, int]]) -> None:
        """Draw the roles of heads that changed, epoch by epoch."""
        rows = sorted(changed[:MOST_ROWS])
        shown = f", those that moved farthest: {len(rows)}" if len(rows) < len(changed) else ""
        caption = f"in all {len(changed)}{shown}; pale: not sure; head 3.5 is head 5 of layer 3"
        left = self.panel(top, 1, "5  Heads that changed what they do", caption)
        looks = [look.roles.labels() for look in found.looks]
        wide = min(150, (self.column - LABEL) // len(looks))
        for number in range(len(looks)):
            text, place = f"epoch {number}" if number else "before", left + LABEL + number * wide
            self.text(top + HEAD - 17, place, text, width=wide, align="center", colour=GREY)
        for line, (layer, head) in enumerate(rows):
            self.text(top + HEAD + line * LINE + 4, left, f"head {layer}.{head}", width=LABEL - 8, align="right")
        if rows:
            numbers = np.array([[int(each.label[row]) for each in looks] for row in rows])
            sure = np.array([[bool(each.confidence[row] >= 0.1) for each in looks] for row in rows])
            texts = [["" if each < 0 else ROLE_LABELS[each] for each in row] for row in numbers.tolist()]
            colours = paled(role_colours(numbers, ROLE_LABELS), sure)
            draw_cells(self, top + HEAD, left + LABEL, colours, (LINE, wide), texts=texts)

    def pairs(self, top: int, found: Found) -> None:
        """Draw what every two heads do together."""
        caption = "brown: each covers for the other; blue: one needs the other; white: neither"
        values = found.pairs.interaction.numpy()
        sizes = [sum(layer == name for layer, _ in found.pairs.heads) for name in found.pairs.layer_names]
        high = float(np.nanquantile(np.abs(values), 0.995)) or 1.0
        darkest = f"; darkest: {1000 * high:.0f} (x 1000)"
        left = self.panel(top, 0, "6  What two heads do together, after fine-tuning", caption + darkest)
        cell = MATRIX // len(values)
        colours = shades(np.nan_to_num(values), -high, high, diverging())
        start = top + HEAD - 8
        draw_cells(self, start, left + LABEL, colours, (cell, cell))
        for number, end in enumerate(np.cumsum(sizes)):
            place, begin = end * cell, (end - sizes[number]) * cell
            self.text(start + (place + begin) // 2 - 8, left, f"layer {number}", width=LABEL - 8, align="right")
            if end < len(values):
                self.pixels[start + place - 1, left + LABEL : left + LABEL + cell * len(values)] = GREY
                self.pixels[start : start + cell * len(values), left + LABEL + place - 1] = GREY

    def strongest(self, top: int, found: Found) -> None:
        """List the strongest pairs, and the heads that can go."""
        caption = "measured again, exactly, on other sentences; x 1000, with standard error"
        left = self.panel(top, 1, "7  The strongest pairs, and heads that can go", caption)
        top += HEAD - 12
        for title, pairs in (
            ("Redundant: without both, the loss rises by so much more than without each", found.pairs.redundant(PAIRS)),
            ("Synergetic: without both, it rises by so much less", found.pairs.synergetic(PAIRS)),
        ):
            self.text(top, left, title, TEXT, width=self.column)
            for pair in pairs:
                top += LINE
                self.text(top, left + 16, _pair(found, pair), TEXT, width=self.column - 16)
            top += LINE + 14
        for text in _removable(found):
            self.text(top, left, text, TEXT, width=self.column)
            top += LINE
        self.curve(top + 14, left, found)

    def curve(self, top: int, left: int, found: Found) -> None:
        """Draw the loss without ever more heads as bars."""
        curve = found.looks[-1].study.pruning
        self.text(top, left, "Loss without ever more heads, the least important ones first", TEXT, width=self.column)
        losses = (curve.loss + curve.change).numpy()
        wide = self.column // max(len(losses), 1)
        bottom, can_go = top + LINE + 22 + BARS, found.removed_together()[0]
        for number, (count, value) in enumerate(zip(curve.removed, losses, strict=True)):
            high, place = round(BARS * max(float(value), 0.0) / float(losses.max())), left + number * wide
            colour = diverging(5)[1] if count <= can_go else diverging(5)[3]
            self.pixels[bottom - max(high, 1) : bottom, place + 4 : place + wide - 4] = colour
            self.text(bottom - high - 18, place, f"{value:.2f}", width=wide, align="center")
            self.text(bottom + 5, place, str(count), width=wide, align="center", colour=GREY)
        self.text(bottom + 22, left, "heads taken away; blue: those that can go", width=self.column, colour=GREY)


def _changed(found: Found) -> list[tuple[int, int]]:
    """Return layer and number of heads with another role than before, those that moved farthest first."""
    first, last = (look.roles.labels().label for look in (found.looks[0], found.looks[-1]))
    moved = sum(np.nan_to_num(np.array(entry["drift"], np.float64)) for entry in found.roles.timeline)
    heads = [(layer, head) for layer, head in (first != last).nonzero().tolist()]
    return sorted(heads, key=lambda head: -moved[head])


def _pair(found: Found, pair: Any) -> str:
    names, exact = list(found.pairs.layer_names), found.again[1]
    row, column = (found.pairs.heads.index(head) for head in pair[:2])
    value, error = float(exact.interaction[row, column]), float(exact.standard_error[row, column])
    heads = " and ".join(f"{names.index(layer)}.{head}" for layer, head in pair[:2])
    return f"heads {heads}: {1000 * value:+.1f} ± {1000 * error:.1f}  (first estimate {1000 * pair.interaction:+.1f})"


def _removable(found: Found) -> list[str]:
    if found.removed is None:
        return ["No head can go."]
    count, change, error = found.removed_together()
    more = f"by {change:+.3f} ± {error:.3f} of {found.removed.loss:.3f}"
    return [
        f"{count} of {len(found.pairs.heads)} heads can go together: on other sentences",
        f"that changes the loss {more}.",
    ]

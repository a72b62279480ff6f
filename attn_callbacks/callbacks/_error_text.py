"""An error analysis as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attn_callbacks.callbacks._error_result import ErrorAnalysisResult, WrongSample

__all__ = ["error_scalars", "error_text"]

_MOST_ROWS = 20


def error_text(result: ErrorAnalysisResult) -> str:
    """Return the heads that attend differently on mistakes, and the samples that went most wrong, as Markdown."""
    return "\n".join(_lines(result))


def error_scalars(result: ErrorAnalysisResult) -> dict[str, float]:
    """Return numbers by tag: how much is wrong, how many heads differ, and by how much at most."""
    return {
        "errors/rate": result.error_rate,
        "errors/heads": float(len({(each.layer, each.head) for each in result.differences()})),
        "errors/largest_effect": max(result.outcome.g.abs().nan_to_num(0.0).flatten().tolist(), default=0.0),
    }


def _lines(result: ErrorAnalysisResult) -> Iterator[str]:
    wrong, right = result.samples.sum(dim=0).tolist()
    yield f"**Epoch {result.epoch}: {wrong} of {wrong + right} samples are predicted wrong.**"
    yield ""
    yield from _differences(result)
    for title, samples in (("highest loss", result.worst), ("most confident and wrong", result.confident)):
        if samples:
            yield from ("", f"**Samples: {title}**", "")
            yield from _sample_table(samples, result.class_names)


def _differences(result: ErrorAnalysisResult) -> Iterator[str]:
    found = result.differences()
    tests = int((~result.outcome_p.isnan()).sum())
    if not tests:
        yield "Fewer than two samples are wrong, or right: there is nothing to compare."
        return
    if not found:
        yield f"No head attends differently on mistakes beyond chance ({tests} comparisons, Holm, level 5%)."
        return
    yield f"Heads that attend differently on mistakes, beyond chance ({tests} comparisons, Holm, level 5%):"
    yield ""
    yield "| layer | head | statistic | wrong | right | effect (95%) | within classes | p |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for each in found[:_MOST_ROWS]:
        within = f"{each.within:+.2f}" if each.within == each.within else ""  # NaN is not itself
        yield (
            f"| {each.layer} | {each.head} | {each.statistic} | {each.wrong:.4g} | {each.right:.4g} | "
            f"{each.g:+.2f} ({each.low:+.2f} to {each.high:+.2f}) | {within} | {each.p_value:.1g} |"
        )
    if len(result.class_names) > 1:
        yield ""
        yield (
            "`within classes` compares wrong and right samples of the same class. Where it is near zero, or empty "
            "because classes are all wrong or all right, the effect may be that of the class and not of the mistake."
        )
    if len(found) > _MOST_ROWS:
        yield f"\nThe {_MOST_ROWS} largest of {len(found)} are shown."


def _sample_table(samples: Sequence[WrongSample], classes: tuple[str, ...]) -> Iterator[str]:
    texts = any(sample.labels for sample in samples)  # images have none
    yield "| sample | loss | class | predicted | with |" + " text |" * texts
    yield "|---:|---:|---|---|---:|" + "---|" * texts
    for sample in samples:
        told = (_cell(classes[n]) if n < len(classes) else str(n) for n in (sample.target, sample.predicted))
        text = _cell(" ".join(sample.labels[:_MOST_ROWS])) + " …" * (len(sample.labels) > _MOST_ROWS)
        cells = [
            str(sample.number),
            f"{sample.loss:.3g}",
            *told,
            f"{sample.confidence:.3f}",
            *([text] if texts else []),
        ]
        yield f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Return a text that breaks no table and is no markup."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return plain.replace("|", "\\|")

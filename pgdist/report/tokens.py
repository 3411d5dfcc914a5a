"""An example's tokens with what the three masks say of each, for the section on what the model sees."""

from __future__ import annotations

from dataclasses import dataclass

from pgdist.report.data import Example


@dataclass(frozen=True, kw_only=True)
class Token:
    """One token, or a run of equal padding: how it is written, its part of the text, and its bits of the
    masks."""

    text: str
    part: str  # prefix, suffix (not scored), loss (a scored suffix token), padding
    first: int  # position in the text
    count: int
    mask_input: int
    mask_ar: int
    mask_loss: int


def describe_tokens(example: Example) -> tuple[Token, ...]:
    """The tokens in their order; a run of equal padding is told once, with its length."""
    tokens: list[Token] = []
    bits = zip(example.pieces, example.mask_input, example.mask_ar, example.mask_loss, strict=True)
    for position, (piece, mask_input, mask_ar, mask_loss) in enumerate(bits):
        token = Token(
            text=_visible(piece),
            part=_part(mask_input, mask_ar, mask_loss),
            first=position,
            count=1,
            mask_input=mask_input,
            mask_ar=mask_ar,
            mask_loss=mask_loss,
        )
        if tokens and _is_same_padding(tokens[-1], token):
            last = tokens.pop()
            token = Token(**{**vars(last), "count": last.count + 1})
        tokens.append(token)
    return tuple(tokens)


def _part(mask_input: int, mask_ar: int, mask_loss: int) -> str:
    # A scored token is shown as scored even where it should not be, on padding: that is a bug worth seeing.
    if mask_loss:
        return "loss"
    if not mask_input:
        return "padding"
    return "suffix" if mask_ar else "prefix"


def _is_same_padding(one: Token, other: Token) -> bool:
    same_bits = (one.mask_ar, one.mask_loss) == (other.mask_ar, other.mask_loss)
    return one.part == other.part == "padding" and one.text == other.text and same_bits


def _visible(piece: str) -> str:
    """Line ends and empty pieces would take no room on the page."""
    return piece.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥") or "∅"

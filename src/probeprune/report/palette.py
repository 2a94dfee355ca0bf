"""Colours and marks of methods, the same in every figure.

Okabe and Ito's hues, told apart by colour-blind readers too, as they are for paper and print, darkened where
white takes their contrast away, lightened on black. A mark of its own makes a method known without colour.
"""

COLOURS: tuple[tuple[str, str, str], ...] = (
    # plain (Okabe and Ito), on white, on black
    ("#0072B2", "#0072B2", "#4BA6E0"),
    ("#D55E00", "#D55E00", "#E8792B"),
    ("#009E73", "#00875F", "#1FB889"),
    ("#CC79A7", "#B5568A", "#DB8FBA"),
    ("#E69F00", "#B07800", "#E69F00"),
    ("#56B4E9", "#2B8CC4", "#8CCDF2"),
    ("#7F7F7F", "#6B6B6B", "#A9A9A9"),
)
"""Seven, and eight marks: 56 methods before a pair of them comes back."""

MATPLOTLIB_MARKS = "osD^vP*X"

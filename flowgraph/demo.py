"""What `flowgraph demo` traces: word problems, with solutions written down (right and wrong) or left to the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One response to trace.

    Attributes:
        title: its name on the page. question: what the user asks.
        response: a written solution; None: the model is to answer.
    """

    title: str
    question: str
    response: str | None


_ROLLS = (
    "A bakery fills 6 trays with 12 rolls each. By noon 45 rolls are sold, and 9 of the others go to the school next "
    "door. How many rolls are left?"
)

ITEMS = (
    Item(
        "Rolls, solved",
        _ROLLS,
        "The bakery starts with 6 * 12 = 72 rolls.\n"
        "By noon 45 are sold, so 72 - 45 = 27 rolls remain.\n"
        "The school gets 9 of them: 27 - 9 = 18.\n"
        "A: 18",
    ),
    Item(
        "Rolls, with a slip in the first step",
        _ROLLS,
        "The bakery starts with 6 * 12 = 62 rolls.\n"
        "By noon 45 are sold, so 62 - 45 = 17 rolls remain.\n"
        "The school gets 9 of them: 17 - 9 = 8.\n"
        "A: 8",
    ),
    Item(
        "A bicycle trip, with things that do not matter",
        "Nadia cycles to her grandmother, who lives 18 km away. The first 10 km take her 40 minutes. She rests for 15 "
        "minutes under a chestnut tree that is 120 years old, and rides the remaining way at 16 km per hour. Her bag "
        "weighs 3 kg. How many minutes does the whole trip take?",
        "Let me split the trip into three parts.\n"
        "First part: 10 km in 40 minutes.\n"
        "Rest: 15 minutes. The age of the tree and the weight of the bag play no role.\n"
        "Second part: 18 - 10 = 8 km are left. At 16 km per hour, 8 km take half an hour, which is 30 minutes.\n"
        "Wait, is the speed for the rest of the way only? Yes, so that holds.\n"
        "Together: 40 + 15 + 30 = 85 minutes.\n"
        "The answer is \\boxed{85}.",
    ),
    Item(
        "Notebooks, answered by the model itself",
        "Anna buys 3 notebooks for $4 each and a pen for $2. How much does she pay in total? Answer in two short "
        "sentences and end with: The answer is ...",
        None,
    ),
)

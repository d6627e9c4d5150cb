"""Open stand-ins for the report's closed corpora: where each is, under which licence, and how large.

Every figure names its source; what could not be checked is None, and printed as "?".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A folder of Parquet files in a data set on the Hugging Face hub."""

    dataset: str
    """OWNER/NAME on the hub."""
    folder: str
    """Folder of the subset in the data set's repository."""
    revision: str
    """Commit, so that the data cannot change; each was checked on the page of that commit on the hub."""
    licence: str
    """Licence that the data set's card gives. The licence of a collection does not replace those of the texts in it."""
    tokens: int | None
    """Published number of tokens; None if no source gives one."""
    counted: str
    """Who gives the number of tokens, and with which tokenizer."""
    text_field: str = "text"
    """Column that holds the text."""
    note: str = ""
    """What a user should know before using it."""

    @property
    def url(self) -> str:
        """Address of the folder, as `prepare` reads it."""
        return f"hf://datasets/{self.dataset}@{self.revision}/{self.folder}"

    @property
    def place(self) -> str:
        """Path of the folder below a directory of downloaded data sets, named OWNER/NAME each."""
        return f"{self.dataset}/{self.folder}"


@dataclass(frozen=True)
class OpenData:
    """The corpora of a recipe."""

    weights: Mapping[str, int]
    """Corpus -> weight in the mixture, as the report's."""
    corpora: Mapping[str, tuple[Source, ...]]
    """Corpus -> what it is made of."""
    instead_of: Mapping[str, str]
    """Corpus -> the report's corpus that it stands for."""


_SMOLLM = "3ba9d605774198c5868892d7a8deda78031a781f"
_CARD = "SmolLM's model card on the hub (HuggingFaceTB/SmolLM-1.7B); tokenizer not stated"

COSMOPEDIA_V2 = Source(
    "HuggingFaceTB/smollm-corpus", "cosmopedia-v2", _SMOLLM, "odc-by", 28_000_000_000, _CARD, note="by Mixtral-8x7B"
)
COSMOPEDIA_V1 = Source(
    "HuggingFaceTB/cosmopedia",
    "data",
    "0ae6ec63f91742bd2d1eaef4f02232c55d719385",
    "apache-2.0",
    25_000_000_000,
    "HuggingFaceTB's page on the hub; tokenizer not stated",
    note="by Mixtral-8x7B; it may share prompts with v2",
)
FINEWEB_EDU = Source("HuggingFaceTB/smollm-corpus", "fineweb-edu-dedup", _SMOLLM, "odc-by", 220_000_000_000, _CARD)
PYTHON_EDU = Source(
    "Avelina/python-edu-cleaned",
    "data",
    "3cb2992c05a1d6efe621a4dd6d1a4b71dfa6ee9f",
    "odc-by",
    4_000_000_000,
    f"{_CARD}; counted on the original, not on this copy, whose card gives 7,677,467 files",
    note="a copy with texts: SmolLM-Corpus's own python-edu holds ids of Software Heritage's files, whose download in "
    "bulk needs an agreement with Software Heritage; each file keeps its repository's licence",
)

_SYNTHETIC = (COSMOPEDIA_V2, COSMOPEDIA_V1)

OPEN_DATA: dict[str, OpenData] = {
    # Section 2.2 of the report: 20% phi-1's data, mostly filtered code, and 80% synthetic textbooks.
    "phi-1.5-open": OpenData(
        {"synthetic": 80, "code": 20},
        {"synthetic": _SYNTHETIC, "code": (PYTHON_EDU,)},
        {
            "synthetic": "about 20 B tokens of synthetic textbooks",
            "code": "phi-1's 7 B tokens, mostly filtered code",
        },
    ),
    # Section 2.4: 40% filtered web, 20% code, 40% synthetic.
    "phi-1.5-web-open": OpenData(
        {"web": 40, "code": 20, "synthetic": 40},
        {"web": (FINEWEB_EDU,), "code": (PYTHON_EDU,), "synthetic": _SYNTHETIC},
        {
            "web": "88 B tokens of filtered RefinedWeb",
            "code": "phi-1's code, and 7 B tokens of The Stack and StackOverflow",
            "synthetic": "about 20 B tokens of synthetic textbooks",
        },
    ),
}
"""Recipe -> its data."""

"""Which of DIYSink's tokens a question gets (2510.08510, "To Sink or Not to Sink", training-based part).

*Hard* routing (the paper's CoT) picks one of three inputs: the tokens of the sinks, the others, or both. Every router
picks among the same three passes, so nothing is computed again: answer all questions under three interventions named
"sinks", "others" and "both" (`evaluate`), let a router decide for each `id`, and `routed` looks the answers up.

*Soft* routing (the paper's ReW) gives both kinds of tokens a weight that follows from the question: `ReW`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from sinkstudy import digests
from sinkstudy.answers.evaluate import NONE, Intervention, Prefixes, evaluate
from sinkstudy.model.identity import Identity
from sinkstudy.model.lvlm import LVLM
from sinkstudy.trained.connectors import DIYSink
from sinkstudy.trained.loop import Method
from sinkstudy.world import questions as lab

ROUTES = ("sinks", "others", "both")
OF_TYPE = {"global": "sinks", "local": "others", "mixed": "both"}  # what the paper holds to be right of a question
OPPOSITE = {"sinks": "others", "others": "sinks", "both": "both"}


# ------------------------------------------------------------------------------------------------- asking the model
@dataclass(frozen=True)
class Wording:
    """The two questions of CoT routing, and the answers that are compared.

    `image` is asked about each picture; `question` about each question, which it quotes as {question}. The first tokens
    of all answers to one of them must differ.
    """

    image: str
    simple: tuple[str, ...]
    complex: tuple[str, ...]
    question: str
    holistic: tuple[str, ...]
    local: tuple[str, ...]


# The paper tells what is asked, but not in which words: these are ours.
GENERAL = Wording(
    image="Is this image simple and symbolic, like a chart or a drawing, or is it complex, like a photograph "
    "of the real world? Answer with one word, simple or complex.",
    simple=("simple",),
    complex=("complex",),
    question="Somebody asks about this image: {question}\nDo not answer that. Does it need a holistic understanding of "
    "the whole image, or a local understanding of one part of it? Answer with one word, holistic or local.",
    holistic=("holistic",),
    local=("local",),
)
# A simple scene of the lab has one part. The second question is one that the arms of `lab.arms` learned to answer, in a
# wording that their training did not have; a model that never learned it cannot judge.
LAB = Wording(
    image="how many parts are there ?",
    simple=("one",),
    complex=("two", "three", "four"),
    question=lab.routing_form("{question}", lab.HELD_OUT[0], swapped=False),
    holistic=("A",),
    local=("B",),
)


def cot(
    lvlm: LVLM, table: pd.DataFrame, how: Intervention = NONE, *, wording: Wording = GENERAL, **options: Any
) -> pd.DataFrame:
    """CoT routing: the model itself judges the picture, once, and each question.

    The more likely of the answers' first tokens counts. Each of the two is asked in a prompt of its own: whether the
    paper's second question follows the first one's answer is not known.

    Args:
        table: as `evaluate` takes it.
        how: how the model reads the picture when it is asked; for DIYSink with both kinds of tokens.
        options: of `evaluate`, such as `images` and `batch_size`.

    Returns:
        By the `id` of the table: `simple`, log-probability (nats) of the most likely answer that says simple minus that
        of the most likely one that says complex; `holistic`, the same for holistic minus local; and the `route`.

    Raises:
        ValueError: the model's tokenizer does not know a word of the wording; or as `evaluate`.
    """
    _words_known(lvlm, wording)
    pictures = table.drop_duplicates("image_id")
    pictures = pictures.assign(id=pictures.image_id, question=wording.image)
    asked = table.assign(question=[wording.question.format(question=q) for q in table.question])

    def margin(of: pd.DataFrame, yes: tuple[str, ...], no: tuple[str, ...]) -> pd.Series:
        said = evaluate(lvlm, of, [how], candidates=yes + no, max_new_tokens=1, **options).set_index("id")
        return said[[f"logp_{a}" for a in yes]].max(axis=1) - said[[f"logp_{a}" for a in no]].max(axis=1)

    simple = margin(pictures, wording.simple, wording.complex)  # by image_id
    holistic = margin(asked, wording.holistic, wording.local)
    out = pd.DataFrame({"simple": simple[table.image_id].to_numpy(), "holistic": holistic}, index=holistic.index)
    return out.assign(route=decided(out.simple > 0, out.holistic > 0))


def _words_known(lvlm: LVLM, wording: Wording) -> None:
    tokenizer = lvlm.processor.tokenizer
    texts = [wording.image, wording.question.format(question=""), *wording.simple, *wording.complex]
    words = dict.fromkeys(word for text in (*texts, *wording.holistic, *wording.local) for word in text.split())
    unknown = [word for word in words if tokenizer.unk_token_id in tokenizer.encode(word, add_special_tokens=False)]
    if unknown:
        raise ValueError(f"{lvlm.name} does not know {', '.join(unknown[:3])}: it cannot be asked in this wording")


def decided(simple: pd.Series, holistic: pd.Series) -> pd.Series:
    """The paper's rule, from two bool [questions]: simple and holistic -> sinks, complex and local -> others."""
    chosen = np.select([simple & holistic, ~simple & ~holistic], ["sinks", "others"], "both")
    return pd.Series(chosen, index=simple.index, name="route")


# ------------------------------------------------------------------------------------------------- routers to compare
def by_type(types: pd.Series) -> pd.Series:
    """The oracle of one axis, which knows each question's type: "global", "local" or "mixed", by its `id`.

    Raises ValueError for another type.
    """
    if unknown := sorted(set(types) - set(OF_TYPE), key=str):
        raise ValueError(f"unknown type of question {unknown[0]!r}; known: {', '.join(OF_TYPE)}")
    return types.map(OF_TYPE).rename("route")


def by_both_axes(types: pd.Series, simple: pd.Series) -> pd.Series:
    """The oracle of the paper's rule, which knows each question's type and whether its picture is simple.

    Global questions about simple pictures get the sinks, local ones about complex pictures the others, all else both:
    a mixed question is neither holistic nor local. `simple`: bool, with the index of `types`.
    """
    route = by_type(types)
    return route.where(((types == "global") & simple) | ((types == "local") & ~simple), "both")


def opposite(route: pd.Series) -> pd.Series:
    """The router that is wrong wherever another one chooses: sinks and others exchanged."""
    return route.map(OPPOSITE)


def dealt_at_random(route: pd.Series, seed: int = 0) -> pd.Series:
    """The decisions of another router dealt out at random: each route exactly as often, to random questions."""
    return pd.Series(np.random.default_rng(seed).permutation(route.to_numpy()), index=route.index, name="route")


def routed(said: pd.DataFrame, route: pd.Series) -> pd.DataFrame:
    """The answers that a hard router gives, looked up among those under "sinks", "others" and "both".

    Args:
        said: what `evaluate` returns, with these three interventions (others may be there too).
        route: one of them by the `id` of the question; questions without a route are left out.

    Returns:
        A row for each entry of `route`, in its order: the columns of `said`, "routed" as `intervention`.

    Raises:
        ValueError: an unknown route, an id that comes twice, or an answer that is not there.
    """
    if unknown := sorted(set(route) - set(ROUTES), key=str):
        raise ValueError(f"a route is one of {', '.join(ROUTES)}, not {unknown[0]!r}")
    if route.index.has_duplicates:
        raise ValueError(f"the question {route.index[route.index.duplicated()][0]!r} has two routes")
    wanted = pd.MultiIndex.from_arrays([route.to_numpy(), route.index])
    answers = said.set_index(["intervention", "id"], drop=False)
    if len(lost := wanted.difference(answers.index)):
        raise ValueError(f"{len(lost)} answers are missing, such as that to {lost[0][1]!r} under {lost[0][0]!r}")
    return answers.loc[wanted].assign(intervention="routed").reset_index(drop=True)


class Agreement(NamedTuple):
    """How often a router decides as another one, or as the truth."""

    table: pd.DataFrame  # counts: rows the truth, columns the router, both in the order of ROUTES
    accuracy: float  # share of the questions, 0-1
    kappa: float  # Cohen 1960: 1 all alike, 0 as often as by chance; NaN where both always say the same
    n: int  # questions


def agreement(route: pd.Series, truth: pd.Series) -> Agreement:
    """Compare two routers' decisions, each by the `id` of the question.

    Cohen's kappa is (p - e) / (1 - e) with the share p of questions decided alike and the share e expected of two
    independent routers that pick each route as often as these do.

    Raises:
        ValueError: not the same questions, or none.
    """
    if not len(route) or set(route.index) != set(truth.index) or len(route) != len(truth):
        raise ValueError("the two routers did not decide about the same questions")
    counts = pd.crosstab(truth.loc[route.index].to_numpy(), route.to_numpy())
    counts = counts.reindex(index=ROUTES, columns=ROUTES, fill_value=0)
    counts = counts.rename_axis(index="truth", columns="route")
    shares = counts.to_numpy() / len(route)
    alike, expected = float(np.trace(shares)), float(shares.sum(0) @ shares.sum(1))
    kappa = (alike - expected) / (1 - expected) if expected < 1 else float("nan")
    return Agreement(counts, alike, kappa, len(route))


# ------------------------------------------------------------------------------------------------- soft routing
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # [.., 2] -> weights [.., 2]
    "2softmax": lambda z: 2 * z.softmax(-1),  # sum 2
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": lambda z: z.sigmoid(),
    "free": lambda z: 1 + z,
}


class ReW(Method):
    """Soft routing: the outputs of DIYSink's two connectors get weights that follow from the question.

    A frozen encoder makes a vector q of the question, and a small network R, the only thing that is trained, makes of q
    the weights (sinks, others). R's last layer begins at zero, so "2softmax" and "free" begin with weights of 1, where
    the model is DIYSink, and "softmax" and "sigmoid" with 1/2. Which encoder and which activation the paper has is not
    known.

    What a weight can reach is limited (2604.03316): every layer of the decoder normalises what it reads, so the first
    one reads the same of a token whatever its weight > 0, up to the epsilon of its norm. Weights act through the
    residual stream alone: what the layers add to a token is small beside a large weight and large beside a small one.

    Args:
        diysink: folder of the trained DIYSink, which becomes the model's and is frozen.
        encoder: "own", the model's own decoder, which reads the question alone: mean of the last hidden state over the
            question's tokens, special ones left out; or a hub id or folder of a sentence encoder: mean over all tokens.
            Either has norm 1.
        width: neurons of R, which has one hidden layer.
        activation: a name of `ACTIVATIONS`.
        seed: of R's first weights.

    The question is the text that is asked, with the instruction of its benchmark.

    Raises:
        ValueError: an unknown activation, or a folder or an encoder that cannot be read.
    """

    kind = "rew"
    asks = True

    def __init__(
        self,
        lvlm: LVLM,
        *,
        diysink: str | Path,
        encoder: str = "own",
        width: int = 64,
        activation: str = "2softmax",
        seed: int = 0,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        super().__init__(lvlm, encoder=encoder, width=width, activation=activation, seed=seed)
        self.encoder, self.tokenizer = (None, None) if encoder == "own" else _sentence_encoder(encoder, lvlm.device)
        self.folder, self.diysink = Path(diysink), DIYSink.open(lvlm, diysink)
        self.of = digests.sha256(self.folder / "weights.safetensors")
        self.requires_grad_(False)
        torch.manual_seed(seed)
        q_width = (lvlm.decoder if self.encoder is None else self.encoder).config.hidden_size
        self.router = nn.Sequential(nn.Linear(q_width, width), nn.GELU(), nn.Linear(width, 2)).to(lvlm.device)
        nn.init.zeros_(self.router[2].weight)
        nn.init.zeros_(self.router[2].bias)
        self.vectors: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Self:
        """Stays as it is: what is frozen computes in training as later, without dropout, and R has none."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, questions: Sequence[str]) -> torch.Tensor:
        """The encoder's vectors of questions, float32 [questions, width of q], of norm 1; each is computed once."""
        for question in questions:
            if question not in self.vectors:  # one by one, so that a vector does not depend on the batch
                self.vectors[question] = self._vector(question)
        return torch.stack([self.vectors[question] for question in questions])

    def _vector(self, question: str) -> torch.Tensor:
        own = self.encoder is None
        tokenizer = self.lvlm.processor.tokenizer if own else self.tokenizer
        tokens = tokenizer([question], return_special_tokens_mask=True, truncation=not own, return_tensors="pt")
        special = tokens.pop("special_tokens_mask")[0].bool()
        tokens = tokens.to(self.lvlm.device)
        with torch.autocast(self.lvlm.device.type, enabled=False):  # the same in training as later
            if own:
                hidden = self.lvlm.decoder(input_ids=tokens["input_ids"], use_cache=False).last_hidden_state
            else:
                hidden = self.encoder(**tokens).last_hidden_state
        kept = ~special if own and not special.all() else torch.ones_like(special)
        return nn.functional.normalize(hidden[0, kept.to(hidden.device)].float().mean(0), dim=0)

    def weights(self, questions: Sequence[str]) -> torch.Tensor:
        """(sinks, others) for each question: float32 [questions, 2]."""
        return ACTIVATIONS[self.settings["activation"]](self.router(self.encode(questions)))

    @contextmanager
    def around(self, inputs: Prefixes) -> Iterator[None]:
        if inputs.questions is None:
            raise ValueError("ReW follows the question: it needs whole prompts with their questions, see Prefixes")
        weights = self.weights(inputs.questions)  # before the hooks: the encoder may be the decoder
        with self.diysink.around(inputs, weights):
            yield

    def changed(self) -> dict[str, nn.Parameter]:
        """R alone."""
        return {f"router.{name}": p for name, p in self.router.named_parameters()}

    def identity(self) -> dict[str, Any]:
        encoder = {}
        if self.encoder is not None:
            encoder = {"encoder_weights": Identity()(dict(self.encoder.named_parameters()))}
        diysink = {**self.diysink.settings, "show": self.diysink.show, "weights": self.of}
        return super().identity() | encoder | {"diysink": diysink}

    def save(self, folder: Path, **more: Any) -> None:
        """Write R to a folder, with where the folder of its DIYSink lies from there."""
        where = os.path.relpath(self.folder.resolve(), Path(folder).resolve())
        super().save(folder, diysink={"folder": Path(where).as_posix(), "sha256": self.of}, **more)

    @classmethod
    def open(cls, lvlm: LVLM, folder: str | Path) -> Self:
        known = cls.described(folder)
        method = cls(lvlm, diysink=Path(folder).resolve() / known["diysink"]["folder"], **known["settings"])
        method.read(folder)
        return method

    def read(self, folder: str | Path) -> None:
        if self.described(folder)["diysink"]["sha256"] != self.of:
            raise ValueError(f"{folder} belongs to another DIYSink than that of {self.folder}")
        super().read(folder)


def _sentence_encoder(name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """An encoder of sentences and its tokenizer; weights from safetensors only, no code of its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        encoder = AutoModel.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"the sentence encoder {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    if encoder.config.is_encoder_decoder:
        raise ValueError(f"{name!r} is an encoder with a decoder; a sentence encoder is needed")
    return encoder.eval().to(device), tokenizer


def balanced(table: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """n rows of a table drawn without replacement, as many of each type of question, in random order.

    ReW is trained on 120 or 240 such samples in the paper.

    Raises:
        ValueError: n is not a multiple of the number of types, or a type has too few rows.
    """
    counts = table.type.value_counts()
    each, left = divmod(n, len(counts))
    if left or n <= 0:
        raise ValueError(f"{n} samples cannot be balanced over {len(counts)} types; take a multiple of {len(counts)}")
    if counts.min() < each:
        raise ValueError(f"{each} rows of each type are needed; there are {counts.min()} of {counts.idxmin()!r}")
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(np.flatnonzero(table.type == kind), each, replace=False) for kind in sorted(counts.index)]
    return table.iloc[rng.permutation(np.concatenate(drawn))]

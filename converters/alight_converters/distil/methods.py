"""The ways to distil, each with its options. Each one says what is minimized, and on which rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.behaviour import written_by_teacher
from alight_converters.distil.features import FeatureObjective
from alight_converters.distil.on_policy import SomeOnPolicy
from alight_converters.memory import RowsAtOnce
from alight_converters.passes import Context
from alight_converters.training.config import Training
from alight_converters.training.data import Batch, Batches, Shuffled
from alight_converters.training.head import SplitModel
from alight_converters.training.losses import Divergence, DivergenceKind
from alight_converters.training.objective import Objective
from alight_converters.training.teacher import LiveTeacher, StoredTeacher, Tokens
from alight_converters.training.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """What a method works with.

    Attributes:
        teacher: `teacher_checkpoint` in memory, on the device, frozen.
        run: identifies the run, in the names of what is kept in the work folder.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    teacher_checkpoint: Checkpoint
    context: Context
    world: World
    run: str
    training: Training

    @property
    def rows(self) -> Batch:
        return Batch.of(self.context.calibration.rows)


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Soft(_Method):
    """Learns from probabilities."""

    divergence: DivergenceKind = "forward_kl"
    jsd_beta: float = Field(default=0.5, gt=0, lt=1)
    temperature: float = Field(default=1.0, gt=0)

    def _live(self, setting: Setting) -> LiveTeacher:
        return LiveTeacher(SplitModel(setting.teacher), self._divergence())

    def _divergence(self) -> Divergence:
        return Divergence(self.divergence, self.temperature, self.jsd_beta)


class Logit(_Soft):
    """The teacher's next-token probabilities (Hinton et al. 2015).

    Attributes:
        top_k: run the teacher over all rows once and keep only its k most likely tokens per position, on
            disk; worth it where rows are seen many times. None: compute its logits whenever they are needed.
    """

    kind: Literal["logit"] = "logit"
    top_k: int | None = Field(default=None, ge=1)

    def prepare(self, setting: Setting) -> tuple[Objective, Batches]:
        batches = Shuffled(setting.rows, setting.context.seed)
        if self.top_k is None:
            return Objective(setting.student, self._live(setting)), batches
        stored = StoredTeacher.store(
            SplitModel(setting.teacher),
            setting.rows,
            self.top_k,
            self._divergence(),
            setting.context.work / f"teacher-{setting.run}",
            setting.world,
            setting.context.progress,
            shared=SplitModel(setting.student).weight.shape[0],
        )
        return Objective(setting.student, stored), batches


class Feature(_Soft):
    """The teacher's hidden states, through projectors, together with its probabilities (FitNets, TinyBERT).

    Attributes:
        weight: of the distance between hidden states, against the divergence of the probabilities.
    """

    kind: Literal["feature"] = "feature"
    weight: float = Field(default=1.0, gt=0)

    def prepare(self, setting: Setting) -> tuple[Objective, Batches]:
        objective = FeatureObjective(setting.student, self._live(setting), self.weight)
        return objective, Shuffled(setting.rows, setting.context.seed)


class Behaviour(_Method):
    """What the teacher writes, as plain text (Kim & Rush 2016, sequence-level distillation).

    Everything it writes is learned, its reasoning before the answer too (as in DeepSeek-R1, 2025).

    Attributes:
        prompts: a JSON Lines file; each line has "messages" or "prompt", and may have a "response" that was
            recorded before. None: the beginnings of the calibration rows.
        prompt_tokens: how much of a calibration row is a prompt.
        new_tokens: the longest text written.
        temperature: that the teacher samples with; 0 takes the most likely token.
    """

    kind: Literal["behaviour"] = "behaviour"
    prompts: Path | None = None
    prompt_tokens: int = Field(default=32, ge=1)
    new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, ge=0)

    def prepare(self, setting: Setting) -> tuple[Objective, Batches]:
        written = written_by_teacher(
            setting.teacher,
            setting.teacher_checkpoint,
            setting.context,
            setting.world,
            setting.context.work / f"written-{setting.run}",
            prompts=self.prompts,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            temperature=self.temperature,
        )
        return Objective(setting.student, Tokens()), Shuffled(written, setting.context.seed)


class OnPolicy(_Soft):
    """The teacher's probabilities on text that the student writes itself (Agarwal et al. 2023, GKD).

    Attributes:
        share: lambda of the paper: the share of steps on the student's own text. The others are on the
            calibration rows.
        prompt_tokens: how much of a row is the prompt; the student writes the rest.
        sampling_temperature: that it samples with.
    """

    kind: Literal["on_policy"] = "on_policy"
    divergence: DivergenceKind = "jsd"
    share: float = Field(default=0.5, ge=0, le=1)
    prompt_tokens: int = Field(default=32, ge=1)
    sampling_temperature: float = Field(default=1.0, gt=0)

    def prepare(self, setting: Setting) -> tuple[Objective, Batches]:
        batches = SomeOnPolicy(
            Shuffled(setting.rows, setting.context.seed),
            setting.student,
            share=self.share,
            prompt_tokens=self.prompt_tokens,
            temperature=self.sampling_temperature,
            seed=setting.context.seed,
            at_once=RowsAtOnce(
                setting.training.batch,
                "writing the student's own text",
                "Use shorter rows, or a device with more memory.",
            ),
        )
        return Objective(setting.student, self._live(setting)), batches


Method = Logit | Feature | Behaviour | OnPolicy

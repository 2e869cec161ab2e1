"""The distillation pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from alight_converters.checkpoint import Checkpoint
from alight_converters.distil.lora import LoRA
from alight_converters.distil.methods import Logit, Method, Setting
from alight_converters.distil.students import random_student
from alight_converters.passes import Context, Pass
from alight_converters.training.config import Training
from alight_converters.training.state import identity
from alight_converters.training.teacher import require_same_tokenizer
from alight_converters.training.trainer import train
from alight_converters.training.world import World


class Distil(Pass):
    """Train a student to do what a teacher with the same tokenizer does.

    The student is the pass's input (a pruned model, say) unless `student` or `random_student` names another.

    Attributes:
        method: "logit", "feature", "behaviour" or "on_policy", alone or with its options.
        teacher: a checkpoint folder. None: the checkpoint that the recipe began with.
        student: a checkpoint folder.
        random_student: changes to the teacher's config, for a student that starts with random weights.
        lora: train low-rank adapters, which are merged at the end. None: train all weights.
    """

    in_all_processes: ClassVar[bool] = True

    kind: Literal["distil"] = "distil"
    method: Method = Field(default=Logit(), discriminator="kind")
    teacher: Path | None = None
    student: Path | None = None
    random_student: dict[str, Any] | None = None
    lora: LoRA | None = None
    training: Training = Training()

    @field_validator("method", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_student(self) -> Distil:
        if self.student is not None and self.random_student is not None:
            raise ValueError("student and random_student exclude each other")
        return self

    def run(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        world = World.join(context.device)
        teacher = Checkpoint.open(self.teacher) if self.teacher else context.source
        student = self._student(checkpoint, teacher, context, world)
        require_same_tokenizer(student, teacher)

        inputs = student.digest, teacher.digest, context.calibration.digest, str(context.seed)
        run = identity(self.model_dump_json(), *inputs)
        model = student.load(torch.float32, world.device)
        if self.lora:
            torch.manual_seed(context.seed)
            self.lora.attach(model)
        compute = torch.bfloat16 if self.training.precision == "bf16" else torch.float32
        frozen = teacher.load(compute, world.device).requires_grad_(False)
        setting = Setting(model, frozen, teacher, context, world, run, self.training)
        objective, batches = self.method.prepare(setting)
        train(objective, batches, self.training, context, world, name="distil", run=run)
        if self.lora:
            self.lora.merge(model)
        if world.is_first:
            student.with_model(model, context.folder)
        world.wait()
        return Checkpoint.open(context.folder)

    def _student(
        self, checkpoint: Checkpoint, teacher: Checkpoint, context: Context, world: World
    ) -> Checkpoint:
        if self.student:
            return Checkpoint.open(self.student)
        if self.random_student is None:
            return checkpoint
        changes = json.dumps(self.random_student, sort_keys=True)
        folder = context.work / f"student-{identity(changes, teacher.digest, str(context.seed))}"
        if world.is_first:
            random_student(teacher, self.random_student, folder, context.seed)
        world.wait()
        return Checkpoint.open(folder)

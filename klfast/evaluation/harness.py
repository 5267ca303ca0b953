"""Tasks of lm-evaluation-harness, run on a model of klfast's."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import filter as matching
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klfast.core.errors import InvalidInputError, one_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class HarnessTasks:
    """Tasks, groups of tasks or tags by name, found and loaded once, so that what is wrong with them shows at once.

    Args:
        names: as lm-evaluation-harness lists them, or with wildcards; or paths of .yaml files.
        folder: a folder with more tasks. If it has all of ``names``, the package's own, some ten thousand files, are
            not read.

    Raises:
        InvalidInputError: lm-eval is not installed, no task is named, there is no such task, or its data cannot be
            loaded.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        if not names:
            raise InvalidInputError("name at least one task; `lm-eval ls tasks` lists them")
        try:
            import lm_eval.models.huggingface  # noqa: F401
        except ImportError as error:
            raise InvalidInputError(
                f"tasks of lm-evaluation-harness need the package {error.name}, which is not installed: "
                "pip install 'klfast[lm-eval]'"
            ) from None
        from lm_eval.tasks import TaskManager

        if folder is not None and not folder.is_dir():
            raise InvalidInputError(f"{folder} is not a folder of tasks")
        manager = None if folder is None else TaskManager(include_path=folder, include_defaults=False)
        if manager is None or not all(map(manager.task_index.__contains__, names)):
            manager = TaskManager(include_path=folder)
        self.manager = manager
        self.names = [found for name in names for found in _found(name, manager)]
        for name in self.names:
            self._load(name)

    def _load(self, name: str) -> None:
        try:
            self.manager.load([name])
        except OSError as error:
            raise InvalidInputError(
                f"cannot load the data of task {name!r}: {one_line(error)}; data that lie on a hub need the network "
                "once, and stay in a cache"
            ) from None
        except Exception as error:  # noqa: BLE001 (YAML, templates, data sets: each has errors of its own)
            raise InvalidInputError(f"cannot load the task {name!r}: {one_line(error)}") from None

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 4,
        few_shot: int | None = None,
        limit: int | None = None,
        chat: bool = False,
    ) -> dict[str, Any]:
        """Return what ``lm_eval.simple_evaluate`` returns, without samples.

        Args:
            few_shot: examples before each question; None for the task's own number.
            limit: questions of each task, from its start; None for all.
            chat: ask by the tokenizer's chat template.

        Raises:
            InvalidInputError: the tokenizer has no token that ends a text.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if tokenizer.eos_token_id is None:
            raise InvalidInputError("lm-evaluation-harness needs a tokenizer with a token that ends a text (eos_token)")
        return simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=self.names,
            task_manager=self.manager,
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
        )


def _found(name: str, manager: TaskManager) -> list[str]:
    if name in manager.task_index or (Path(name).suffix in (".yaml", ".yml") and Path(name).is_file()):
        return [name]
    if found := matching(manager.all_tasks, name):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise InvalidInputError(
        f"lm-evaluation-harness has no task {name!r}{meant}; `lm-eval ls tasks` lists them, --include-path adds more"
    )

"""Who writes checkpoints: a thread, so that the training loop waits for the copy of its tensors and not for the disk.

At most one checkpoint waits; a newer one takes its place, because only the newest is worth the time.
"""

from __future__ import annotations

import threading

from training.nets.checkpoints import Checkpoint, CheckpointFolder


class Writer:
    """Writes the checkpoints it is handed into `folder`; at once where it is not `asynchronous`.

    A context: its end waits for what is still to be written. What the thread failed with is raised to whoever hands in
    the next checkpoint, or ends the block.
    """

    def __init__(self, folder: CheckpointFolder, *, asynchronous: bool = True) -> None:
        self.folder, self._asynchronous = folder, asynchronous
        self._changed = threading.Condition()
        self._waiting: Checkpoint | None = None
        self._failure: BaseException | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def submit(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint written; its tensors are the writer's from now on. Raises ComponentError."""
        if not self._asynchronous:
            self.folder.write(checkpoint)
            return
        self._raise_failure()
        with self._changed:
            self._waiting = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _work(self) -> None:
        while (checkpoint := self._next()) is not None:
            try:
                self.folder.write(checkpoint)
            except BaseException as error:  # handed to the training loop, which ends the fit with it
                self._failure = error
                return

    def _next(self) -> Checkpoint | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closing)
            checkpoint, self._waiting = self._waiting, None
            return checkpoint

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self._raise_failure()

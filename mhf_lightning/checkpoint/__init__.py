"""Checkpoints that survive a kill at any byte, open on any number of ranks, and run no code when they are read.

A checkpoint is a folder::

    checkpoints/
      latest                       the name of the newest checkpoint; for people and scripts, nothing here relies on it
      step-200/
        manifest.json              step, kind, and the size and sha256 of every other file; hashed itself
        index.json                 of each tensor: dtype, shape, and which slice of it lies in which file
        shard-00000.safetensors    the slices that rank 0 wrote; tensors that are the same on all ranks are dealt out
        shard-00001.safetensors    ...
        trainer.json               everything else: loops, schedules, callbacks, generators, data cursor, architecture
        trainer.safetensors        the few tensors of trainer.json (states of random number generators)

Tensors are named by their place in the model, ``model/NAME`` and ``optimizer/0/NAME/exp_avg``, and cut by PyTorch's
distributed checkpoint planners, so a run may continue with other ranks and another strategy. There is no pickle.

Commit: everything is written into ``step-200.tmp/`` and synced to disk, the manifest last; then the folder is renamed,
``latest`` is moved, and only then are older checkpoints removed. A folder named ``step-N`` is therefore complete, and
all its files are of one save. DeepSpeed writes its own files, which are pickles; they get the same commit.

The modules, each importing only those above it:

- ``files.py``: safetensors and JSON files, synced and hashed as they are written.
- ``folder.py``: manifest, verification, commit, pruning, finding the newest valid checkpoint. No collectives.
- ``state.py``: from a trainer's state to JSON and named tensors, and back.
- ``shards.py``: which rank writes which slice; saving in the background; loading under another layout.
- ``strategy.py``: the mixin that gives all this to Lightning's strategies. The only module that knows Lightning.
- ``trained.py``: a trained model, and the tokenizer of its dataset.
- ``export.py``: ``mhf export``.
"""

from mhf_lightning.checkpoint.files import CheckpointError
from mhf_lightning.checkpoint.folder import find_newest_valid, verify

__all__ = ["CheckpointError", "find_newest_valid", "verify"]

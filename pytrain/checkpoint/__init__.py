"""Checkpoints: the single-process model in safetensors files, written and read by any number of processes."""

from pytrain.checkpoint.companions import tokenizer_files
from pytrain.checkpoint.files import FileOperations, Group, OneProcess
from pytrain.checkpoint.parts import Snapshot
from pytrain.checkpoint.pieces import TensorEntry, TensorPiece
from pytrain.checkpoint.reader import Checkpoint
from pytrain.checkpoint.retention import prune
from pytrain.checkpoint.store import (
    FolderLock,
    check_whole,
    check_writable,
    checkpoints_folder,
    find_checkpoint,
    free_bytes,
    newest_checkpoint,
    required_bytes,
)
from pytrain.checkpoint.writer import Saving, save, start_save

__all__ = [
    "Checkpoint",
    "FileOperations",
    "FolderLock",
    "Group",
    "OneProcess",
    "Saving",
    "Snapshot",
    "TensorEntry",
    "TensorPiece",
    "check_whole",
    "check_writable",
    "checkpoints_folder",
    "find_checkpoint",
    "free_bytes",
    "newest_checkpoint",
    "prune",
    "required_bytes",
    "save",
    "start_save",
    "tokenizer_files",
]

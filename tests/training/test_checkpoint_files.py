"""Folders of checkpoints: what counts as whole, what the newest is, what may go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sip.training import checkpoint_files as files
from megatron_sip.training.checkpoint_files import CheckpointError


def write(run: Path, step: int) -> Path:
    aside = files.prepare(files.folder_of(run, step), 0)
    for rank in (0, 1):
        (aside / f"__{rank}_0.distcp").write_bytes(b"%d" % step * 100)
        files.write_checksums(aside, f"__{rank}_*", rank)
    (aside / "common.pt").write_bytes(b"common")
    files.publish(aside, files.folder_of(run, step), {"step": step}, "run: {}\n")
    return files.folder_of(run, step)


def latest(run: Path) -> str:
    return (run / "checkpoints" / files.LATEST).read_text()


def test_a_published_checkpoint_is_whole_and_the_newest(tmp_path):
    for step in (2, 10, 9):
        checkpoint = write(tmp_path, step)
        assert files.damage(checkpoint, checksums=True) is None
    assert files.newest(tmp_path).name == "iter_0000010" and [files.step_of(c) for c in files.checkpoints(tmp_path)] == [10, 9, 2]
    assert sorted(files.read_meta(checkpoint)["files"]) == ["__0_0.distcp", "__1_0.distcp", "common.pt", "run.yaml"]
    assert not list(checkpoint.glob("checksums*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", "common.pt", "run.yaml", "meta.json"])
@pytest.mark.parametrize("harm", [flip, os.unlink, lambda path: os.truncate(path, 3)])
def test_any_harm_to_any_file_is_found_and_named(tmp_path, name, harm):
    checkpoint = write(tmp_path, 1)
    harm(checkpoint / name)
    assert name in files.damage(checkpoint, checksums=True)


def test_ranks_share_the_reading(tmp_path):
    checkpoint = write(tmp_path, 1)
    flip(checkpoint / "__1_0.distcp")
    found = [files.damage(checkpoint, checksums=True, share=(i, 3)) for i in range(3)]
    assert sum(text is not None for text in found) == 1
    assert files.damage(checkpoint, checksums=False) is None  # sizes alone do not tell


def test_damage_is_put_aside_and_latest_follows(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    assert latest(tmp_path) == "2"
    assert files.put_aside(files.newest(tmp_path)).name == "damaged_iter_0000002"
    assert files.newest(tmp_path).name == "iter_0000001" and latest(tmp_path) == "1"
    files.put_aside(files.newest(tmp_path))
    assert files.newest(tmp_path) is None and not (tmp_path / "checkpoints" / files.LATEST).exists()


def test_latest_is_mended_after_a_stop_before_it_was_written(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / files.LATEST).write_text("1")
    files.mend_latest(tmp_path)
    assert latest(tmp_path) == "2"


def test_the_newest_and_every_mth_stay(tmp_path):
    for step in (5, 10, 15, 20, 25, 30, 35):
        write(tmp_path, step)
    files.prune(tmp_path, keep=2, keep_every=10)
    assert [files.step_of(c) for c in files.checkpoints(tmp_path)] == [35, 30, 20, 10]
    assert files.oldest_to_resume_from(tmp_path, 2) == 30
    files.prune(tmp_path, keep=1, keep_every=0)
    assert [files.step_of(c) for c in files.checkpoints(tmp_path)] == [35]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["iter_0000035", files.LATEST]


def test_what_a_stopped_save_left_is_removed_and_never_a_checkpoint(tmp_path):
    aside = files.prepare(files.folder_of(tmp_path, 4), 0)
    (aside / "meta.json").write_text("{}")
    assert files.newest(tmp_path) is None
    assert files.prepare(files.folder_of(tmp_path, 4), 0) != aside and not aside.exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match="MiB needed, .* MiB free in .*; make room or lower checkpoint.keep"):
        files.prepare(files.folder_of(tmp_path, 4), 1 << 60)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == []


def test_meta_of_another_hand_is_no_checkpoint(tmp_path):
    (tmp_path / "meta.json").write_text('{"step": 3, "files": {}}')
    with pytest.raises(CheckpointError, match="meta.json"):
        files.read_meta(tmp_path)

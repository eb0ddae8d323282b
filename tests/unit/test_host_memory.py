"""What memory is left, read from trees of files as the kernel shows them; and which copies may be page-locked."""

from __future__ import annotations

from pathlib import Path

import pytest

from verl_autoexport.errors import SourceError
from verl_autoexport.sources.live.coordinator import page_locked_ranks
from verl_autoexport.sources.live.copier import Layout
from verl_autoexport.system.host_memory import headroom

GIB = 1 << 30
MIB = 1 << 20


def tree(root: Path, cgroup: str, available: int = 100 * GIB) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {200 * GIB >> 10} kB\nMemAvailable: {available >> 10} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def group(path: Path, limit: int | str, used: int, stat: str = "", v1: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
    (path / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{used}\n")
    (path / "memory.stat").write_text(stat)


def test_version_2_where_the_page_cache_counts_as_free(tmp_path):
    root = tree(tmp_path, "0::/pod/box\n")
    stat = f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB}\nshmem {GIB}\n"
    group(root / "sys/fs/cgroup/pod/box", 20 * GIB, 8 * GIB, stat)
    assert headroom(root) == int(0.95 * 20 * GIB) - 6 * GIB


def test_a_limit_further_up_holds_too(tmp_path):
    root = tree(tmp_path, "0::/pod/box\n")
    group(root / "sys/fs/cgroup/pod/box", "max", 8 * GIB)
    group(root / "sys/fs/cgroup/pod", 10 * GIB, 9 * GIB)
    assert headroom(root) == int(0.95 * 10 * GIB) - 9 * GIB


def test_in_a_container_only_the_top_is_seen(tmp_path):
    root = tree(tmp_path, "0::/kubepods/x/y\n")
    group(root / "sys/fs/cgroup", 10 * GIB, 5 * GIB)
    assert headroom(root) == int(0.95 * 10 * GIB) - 5 * GIB


def test_version_1_counts_the_groups_below(tmp_path):
    root = tree(tmp_path, "12:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
    group(root / "sys/fs/cgroup/memory/a", 10 * GIB, 7 * GIB, stat, v1=True)
    group(root / "sys/fs/cgroup/memory", 9223372036854771712, 50 * GIB, v1=True)
    assert headroom(root) == int(0.95 * 10 * GIB) - 5 * GIB


@pytest.mark.parametrize("cgroup", ["", "0::/\n"])
def test_without_a_limit_it_is_what_the_machine_has(tmp_path, cgroup):
    root = tree(tmp_path, cgroup, available=4 * GIB)
    assert headroom(root) == int(0.95 * 4 * GIB)


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path):
    root = tree(tmp_path, "0::/\n")
    group(root / "sys/fs/cgroup", GIB, 2 * GIB)
    assert headroom(root) == 0


def test_this_machine():
    assert 0 < headroom() < 1 << 50


# -- what may be page-locked ---------------------------------------------------------------

LAYOUT = Layout(0, (), (64 * MIB, 33 * MIB))  # page-locked: 64 and 64 MiB


def test_page_locked_memory_is_counted_in_powers_of_two():
    assert (LAYOUT.nbytes, LAYOUT.page_locked_bytes) == (97 * MIB, 128 * MIB)
    assert Layout(0, (), (0,)).page_locked_bytes == 0


def test_the_workers_of_a_node_share_what_is_left(caplog):
    """Each alone would fit twice over; of node b the copies fit, but not page-locked; c has just enough."""
    nodes, layouts = ["a", "b", "b", "c", "c"], [LAYOUT] * 5
    needed = 2 * (97 + 128) * MIB
    left = [GIB, needed - 1, needed - 1, needed, needed]
    assert page_locked_ranks(nodes, layouts, left) == {0, 3, 4}
    assert "node b: page-locked memory would not fit" in caplog.text


def test_a_node_without_memory_for_the_copies_is_refused():
    with pytest.raises(SourceError, match=r"node b: copies of the shards of its 2 workers take 0.41 GB .* 0.39 GB are"):
        page_locked_ranks(["a", "b", "b"], [LAYOUT] * 3, [GIB, 370 * MIB, GIB])

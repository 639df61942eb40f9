"""Power cuts, rehearsed: record what a process writes and syncs, then build what a disk may hold.

    from powercut import recorder, checker

    shim = recorder.compile_shim(tmp_path)              # None where there is no compiler: skip
    log = recorder.record([child.py, root], root, shim=shim, log_path=tmp_path / "log")
    report = checker.check_log(log, check, count=600, seed=1)
    assert not report.failures, report

- `shim.c`, `recorder.py`: one run of a program becomes a log of events (writes, truncations, names,
  syncs, marks), in the order in which the kernel did them. The program reports what it believes
  durable with `mark`.
- `disk.py`: a model of a disk replays that log. At any point of it, it draws crash states: what
  syncs covered is there, and of the rest any subset of sectors, sizes and names.
- `checker.py`: lays each state out as a folder and runs a check in a forked child, so that a
  SIGBUS or an endless loop is one state's failure. The check looks at the folder and at the marks
  that lie before the crash.

Assumptions about the disk, in the order of how much they matter:

1. A 512-byte sector is written whole or not at all, and is read back as it was written.
2. A completed fsync or fdatasync makes that file's data and size durable, and nothing else: no
   other file, and no name. (ext4 gives more: fsync of a new file commits the journal, so also its
   name and all earlier renames. Nothing here relies on that.)
3. An O_DSYNC write makes its own range durable, and the size it needs; no earlier write.
4. fsync of a folder makes the creations, links, renames and unlinks in it durable. Without it each
   may arrive or not, in any subset, one by one; a rename arrives whole. A name that arrived may
   point to a file of which no data did.
5. An unsynced sector holds what the file held there at any moment since it was last durable. A
   size may be any the file had since then; where it runs ahead of the data there are zeros.
   (Stale data of other files, which ext4 shows with data=writeback only, is not modelled.)
6. LMDB's lock files are shared memory: after a crash they are absent, empty or garbage.
"""

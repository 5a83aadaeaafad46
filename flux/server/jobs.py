"""The queue of jobs: a table in a file, which outlives the server, the worker and the machine's power.

A job is queued, running, and then done, failed or cancelled. Every change is one transaction that says from
which state it starts, so that of two processes that want the same job one gets it.
"""

import json
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flux.server.problems import absent, conflict, too_many, unusable

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
ACTIVE = (QUEUED, RUNNING)
FILE = "jobs.sqlite"  # in logs/
TABLE = """
create table if not exists jobs (
    number integer primary key autoincrement, id text unique not null collate nocase,
    kind text not null, name text not null collate nocase,
    request text not null, command text not null, options text not null, state text not null,
    message text not null default '', created real not null, started real, ended real,
    attempt integer not null default 1, cancel integer not null default 0, kills integer not null default 0,
    mark text not null default '', result text not null default '{}')
"""


@dataclass(frozen=True)
class Job:
    """number: the order of the queue. name: of the dataset or the run. command: the program and its words.

    options: for the program's file of options, if there are any. message: what went wrong, or what there is
    to say. attempt: one more with each resume. cancel: whether that is asked for. kills: how often in a row
    the program was killed from outside, without a new `mark`: the state that it would go on from. result: the
    last numbers of a job that has ended.
    """

    number: int
    id: str
    kind: str
    name: str
    request: dict[str, Any]
    command: list[str]
    options: dict[str, Any]
    state: str
    message: str
    created: float
    started: float | None
    ended: float | None
    attempt: int
    cancel: bool
    kills: int
    mark: str
    result: dict[str, Any]

    @property
    def is_active(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class New:
    """A job to be: see `Job`. Ids and names that differ in case alone are one, as some disks have it."""

    kind: str
    name: str
    id: str
    request: dict[str, Any]
    command: tuple[str, ...]
    options: dict[str, Any]


class Jobs:
    """The table in a file. Every method opens it anew: threads and processes may share it."""

    def __init__(self, folder: Path):
        self._path = folder / FILE
        with self._changing() as db:
            db.execute(TABLE)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Problem where the file is damaged, stays locked, or the disk is full."""
        try:
            with closing(sqlite3.connect(self._path, timeout=60, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                yield db
        except sqlite3.DatabaseError as error:
            raise unusable(f"the queue of jobs, {self._path}, does not work: {error}") from None

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other process changes anything in."""
        with self._open() as db:
            db.execute("begin immediate")
            try:
                yield db
            except BaseException:
                if db.in_transaction:  # a full disk has ended it already
                    db.execute("rollback")
                raise
            db.execute("commit")

    # --- What clients do ---

    def add(self, new: New, most: int) -> Job:
        """Put a job into the queue. With an id that is there already: that job, if it is the same request.

        Problem where it is another request's, where a job of this kind and name is active, and where `most`
        are waiting.
        """
        with self._changing() as db:
            if found := _one(db, new.id):
                return same_request(found, new)
            active = f"select id from jobs where kind=? and name=? and state in {ACTIVE}"
            if row := db.execute(active, (new.kind, new.name)).fetchone():
                raise conflict(
                    f"the job {row['id']} does this for {new.name} already: wait for it, or cancel it"
                )
            if db.execute("select count(*) from jobs where state=?", (QUEUED,)).fetchone()[0] >= most:
                raise too_many(f"{most} jobs are waiting, which is the most: try again later")
            tables = (json.dumps(table) for table in (new.request, list(new.command), new.options))
            values = (new.id, new.kind, new.name, *tables, QUEUED, time.time())
            columns = "id, kind, name, request, command, options, state, created"
            db.execute(f"insert into jobs ({columns}) values (?,?,?,?,?,?,?,?)", values)
            return _known(db, new.id)

    def get(self, id: str) -> Job:
        """A job by its id. Problem 404 where there is none."""
        with self._open() as db:
            return _known(db, id)

    def find(self, id: str) -> Job | None:
        """A job by its id, None where there is none."""
        with self._open() as db:
            return _one(db, id)

    def all(self, state: str | None = None, most: int = 1000) -> list[Job]:
        """The newest jobs, the newest first."""
        with self._open() as db:
            where = "" if state is None else "where state=:state"
            rows = db.execute(
                f"select * from jobs {where} order by number desc limit :most", {"state": state, "most": most}
            )
            return [_job(row) for row in rows]

    def active(self) -> list[Job]:
        """Those that wait or run, in the order of the queue."""
        with self._open() as db:
            return [
                _job(row) for row in db.execute(f"select * from jobs where state in {ACTIVE} order by number")
            ]

    def cancel(self, id: str) -> Job:
        """One that waits is cancelled; one that runs is when the worker sees it. Problem for others."""
        with self._changing() as db:
            job = _known(db, id)
            if not job.is_active:
                raise conflict(f"the job {id} is {job.state}: there is nothing to cancel")
            if job.state == QUEUED:
                db.execute("update jobs set state=?, ended=? where id=?", (CANCELLED, time.time(), id))
            db.execute("update jobs set cancel=1 where id=?", (id,))
            return _known(db, id)

    def resume(self, id: str) -> Job:
        """Put a failed or cancelled job into the queue again. Problem for others."""
        with self._changing() as db:
            job = _known(db, id)
            if job.state not in (FAILED, CANCELLED):
                raise conflict(f"the job {id} is {job.state}: only one that failed or was cancelled resumes")
            other = f"select id from jobs where kind=? and name=? and state in {ACTIVE}"
            if row := db.execute(other, (job.kind, job.name)).fetchone():
                raise conflict(f"the job {row['id']} does this for {job.name} already")
            later = "select id from jobs where kind=? and name=? and number>? and started is not null"
            if row := db.execute(later, (job.kind, job.name, job.number)).fetchone():
                raise conflict(f"the later job {row['id']} has used the name {job.name}: start a new one")
            anew = "state=?, cancel=0, kills=0, message='', ended=null, attempt=attempt+1"
            db.execute(f"update jobs set {anew} where id=?", (QUEUED, id))
            return _known(db, id)

    # --- What the worker does ---

    def next(self) -> Job | None:
        """The job that runs, else the first that waits, which runs from now on; None where there is none."""
        with self._changing() as db:
            for state in (RUNNING, QUEUED):
                query = "select id from jobs where state=? order by number limit 1"
                if row := db.execute(query, (state,)).fetchone():
                    started = "update jobs set state=?, started=coalesce(started, ?) where id=?"
                    db.execute(started, (RUNNING, time.time(), row["id"]))
                    return _known(db, row["id"])
        return None

    def killed(self, id: str, kills: int, mark: str) -> None:
        """Note that a job's program was killed: it still runs, for the worker to start it again."""
        with self._changing() as db:
            db.execute("update jobs set kills=?, mark=? where id=?", (kills, mark, id))

    def end(self, id: str, state: str, message: str = "", result: dict[str, Any] | None = None) -> None:
        """Note how a running job ended."""
        with self._changing() as db:
            db.execute(
                "update jobs set state=?, message=?, ended=?, result=? where id=? and state=?",
                (state, message, time.time(), json.dumps(result or {}), id, RUNNING),
            )


def new_id(name: str) -> str:
    """An id that no other job has, from the name of what it works on."""
    return f"{name[:60].rstrip(' .')}-{secrets.token_hex(6)}"


def same_request(job: Job, new: New) -> Job:
    """The job. Problem 409 where it is another request's: an id stands for one."""
    if job.kind != new.kind or job.request != new.request:
        raise conflict(f"the id {job.id} belongs to another request: give a new one")
    return job


def _one(db: sqlite3.Connection, id: str) -> Job | None:
    row = db.execute("select * from jobs where id=?", (id,)).fetchone()
    return _job(row) if row else None


def _known(db: sqlite3.Connection, id: str) -> Job:
    job = _one(db, id)
    if job is None:
        raise absent(f"there is no job {id[:100]!a}")
    return job


def _job(row: sqlite3.Row) -> Job:
    values = {field.name: row[field.name] for field in fields(Job)}
    values |= {name: json.loads(values[name]) for name in ("request", "command", "options", "result")}
    return Job(**values | {"cancel": bool(values["cancel"])})

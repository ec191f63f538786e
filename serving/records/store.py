"""Where records and feedback are kept: SQLite beside the run, or PostgreSQL for several replicas.

    with opened("sqlite:///runs/demo/records.sqlite") as store:
        store.add([RoutingRecord("id", "/v1/chat/completions", 200, 12.5)])

SQLite runs in WAL mode, so that readers and the writing guard do not wait for each other; what `add` has returned from
survives a kill. Tables are made where they are missing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import QueuePool

from fusion.errors import UserError
from serving.records.record import Feedback, RoutingRecord, Shares

TRIES = 5  # to make the tables
PATIENCE = {"connect_timeout": 5, "options": "-c statement_timeout=10000"}  # with PostgreSQL, in s and ms
BUSY_MS = 10_000  # that a writer waits for another one
TABLES = MetaData()
REQUESTS = Table(
    "requests",
    TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(128), nullable=False, index=True),
    Column("time", Float, nullable=False, index=True),
    Column("path", String(64), nullable=False),
    Column("status", Integer, nullable=False),
    Column("ms", Float, nullable=False),
    Column("asker", String(64)),
    Column("streamed", Boolean, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("violations", JSON, nullable=False),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("domain", Text),
    Column("channel", String(32)),
    Column("evidence", Text),
    Column("channels", JSON, nullable=False),
    Column("shares", JSON, nullable=False),
    Column("shares_source", String(16)),
    Column("asked", JSON(none_as_null=True)),
    Column("answered", Text),
    Column("page", Text),  # the request explained, as HTML
    Column("wanted", String(8)),  # of the background pass: shares, or page
    Index("requests_wanted", "wanted"),
)
FEEDBACK = Table(
    "feedback",
    TABLES,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(128), nullable=False, index=True),
    Column("time", Float, nullable=False, index=True),
    Column("asker", String(64)),
    Column("rating", String(8)),
    Column("domain", Text),
    Column("comment", Text, nullable=False),
    Column("messages", JSON(none_as_null=True)),
    Column("answer", Text),
    Column("routed", JSON, nullable=False),
)
_KEPT = [REQUESTS.c[field.name] for field in fields(RoutingRecord)]
_SAID = [FEEDBACK.c[field.name] for field in fields(Feedback)]


class Store:
    """The tables behind one address. Every method may raise SQLAlchemyError where the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, records: Sequence[RoutingRecord], wanted: Sequence[str | None] | None = None) -> None:
        """Keeps records, all or none; `wanted` is what the background pass is to do for each."""
        rows = [
            {**asdict(record), "wanted": what}
            for record, what in zip(records, wanted or [None] * len(records), strict=True)
        ]
        if rows:
            with self._engine.begin() as connection:
                connection.execute(insert(REQUESTS), rows)

    def find(self, request_id: str, owner: str | None = None) -> RoutingRecord | None:
        """The newest record of a request's id; of this owner alone ("" for nobody's) where one is given."""
        query = select(*_KEPT).where(REQUESTS.c.request_id == request_id).order_by(REQUESTS.c.number.desc()).limit(1)
        if owner is not None:
            query = query.where(REQUESTS.c.asker == owner if owner else REQUESTS.c.asker.is_(None))
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        return _record(row) if row else None

    def recent(self, limit: int, since: float = 0.0) -> list[RoutingRecord]:
        """The newest records first, at most `limit`, none from before `since` (seconds since 1970)."""
        query = select(*_KEPT).where(REQUESTS.c.time >= since).order_by(REQUESTS.c.number.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]

    def waiting(self, limit: int) -> list[tuple[int, str, RoutingRecord]]:
        """What the background pass has yet to do: number, what is wanted, record.

        Pages come first, which somebody waits for, then shares, of each the oldest.
        """
        query = select(REQUESTS.c.number, REQUESTS.c.wanted, *_KEPT).where(REQUESTS.c.wanted.is_not(None))
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(REQUESTS.c.wanted, REQUESTS.c.number).limit(limit)).all()
        return [(row[0], row[1], _record(row[2:])) for row in rows]

    def want_page(self, request_id: str) -> bool:
        """Asks the background pass for a page that explains an answered request; False where no text of it is kept."""
        of_it = (REQUESTS.c.request_id == request_id) & REQUESTS.c.asked.is_not(None) & (REQUESTS.c.status == 200)
        with self._engine.begin() as connection:
            return connection.execute(update(REQUESTS).where(of_it).values(wanted="page")).rowcount > 0

    def page(self, request_id: str) -> str | None:
        """The page that explains a request, None where there is none yet."""
        query = select(REQUESTS.c.page).where(REQUESTS.c.request_id == request_id).order_by(REQUESTS.c.number.desc())
        with self._engine.connect() as connection:
            page: str | None = connection.execute(query.limit(1)).scalar_one_or_none()
        return page

    def fill(
        self,
        number: int,
        label: dict[str, Any] | None = None,
        shares: Shares | None = None,
        page: str | None = None,
    ) -> None:
        """Puts down what the background pass has found for a record, which is then no longer waiting.

        `label` are the fields of the record that the label channels decide.
        """
        found: dict[str, Any] = {"wanted": None, **(label or {})}
        if shares:
            found |= {"shares": shares, "shares_source": "explain"}
        if page is not None:
            found["page"] = page
        with self._engine.begin() as connection:
            connection.execute(update(REQUESTS).where(REQUESTS.c.number == number).values(**found))

    def add_feedback(self, said: Sequence[Feedback]) -> None:
        """Keeps feedback, all or none."""
        if said:
            with self._engine.begin() as connection:
                connection.execute(insert(FEEDBACK), [asdict(one) for one in said])

    def feedback(self, limit: int | None = None, since: float = 0.0) -> list[Feedback]:
        """The newest feedback first, none from before `since` (seconds since 1970)."""
        query = select(*_SAID).where(FEEDBACK.c.time >= since).order_by(FEEDBACK.c.number.desc()).limit(limit)
        with self._engine.connect() as connection:
            return [Feedback(**row._mapping) for row in connection.execute(query)]

    def prune(self, keep_days: float, keep_rows: int) -> int:
        """Removes records that are older than `keep_days`, and the oldest beyond `keep_rows`; feedback stays."""
        last = select(REQUESTS.c.number).order_by(REQUESTS.c.number.desc()).offset(keep_rows).limit(1).scalar_subquery()
        old = (REQUESTS.c.time < time.time() - keep_days * 86400) | (REQUESTS.c.number <= last)
        with self._engine.begin() as connection:
            return connection.execute(delete(REQUESTS).where(old)).rowcount

    def remove_feedback(self, request_id: str) -> int:
        """Removes all feedback on a request; how much there was."""
        with self._engine.begin() as connection:
            return connection.execute(delete(FEEDBACK).where(FEEDBACK.c.request_id == request_id)).rowcount

    def count(self) -> int:
        """How many records there are."""
        with self._engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(REQUESTS)).scalar_one())


@contextmanager
def opened(url: str) -> Iterator[Store]:
    """The store at a database's address, its tables made where they are missing. Raises UserError where it fails."""
    engine = _engine(url)
    try:
        _make_tables(engine)
        yield Store(engine)
    except SQLAlchemyError as error:
        raise UserError(f"the records in {_shown(engine)} cannot be used: {_reason(error)}") from None
    finally:
        engine.dispose()


def _make_tables(engine: Engine) -> None:
    """Makes what is missing; of several processes that do so at once PostgreSQL refuses all but one."""
    for left in reversed(range(TRIES)):
        try:
            TABLES.create_all(engine)
            return
        except SQLAlchemyError:
            if not left:
                raise
            time.sleep(0.1)


def _engine(url: str) -> Engine:
    scheme, found, rest = url.partition("://")
    if not found or scheme not in ("sqlite", "postgresql"):
        raise UserError(f"{scheme}://... is no store of records: give sqlite:///FILE or postgresql://USER@HOST/NAME")
    if scheme == "postgresql":
        try:
            return create_engine(f"postgresql+psycopg://{rest}", pool_pre_ping=True, connect_args=PATIENCE)
        except ModuleNotFoundError:
            raise UserError("records in PostgreSQL need its driver: install qwen-fusion[postgres]") from None
        except (SQLAlchemyError, ValueError) as error:
            raise UserError(f"the address of the records is none of PostgreSQL ({error})") from None
    if not rest.strip("/"):
        raise UserError("sqlite:// names no file: give sqlite:///FILE")
    Path(rest.removeprefix("/")).expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, poolclass=QueuePool, connect_args={"check_same_thread": False})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"busy_timeout={BUSY_MS}"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _shown(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=True)


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0]


def _record(row: Row[Any] | Sequence[Any]) -> RoutingRecord:
    return RoutingRecord(*row)  # in the order of _KEPT

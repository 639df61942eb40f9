-- What the PostgreSQL sink keeps, and why each key and index is there. postgres_schema.py runs the
-- parts, each under its "-- ## name"; {schema} is the schema's name, "telemetry" where not said
-- otherwise. Nothing here needs more than CREATE on the database; once the tables are there,
-- SELECT, INSERT, UPDATE and DELETE on them will do (and ownership of readings, for its days).
--
-- Texts that are compared are COLLATE "C": identities are equal byte for byte, the order is that
-- of code points as in the other sinks, and an index compares with memcmp instead of strcoll.


-- ## tables

CREATE SCHEMA IF NOT EXISTS {schema};

-- Where readings came from, once for all that share it: a row of readings then carries 20 bytes
-- of lineage instead of some 100. Rows are added outside of commits and never change. No foreign
-- key from readings: it would look up each row, and hypertables and dropped days gain nothing.
CREATE TABLE {schema}.lineages (
    lineage          integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source           text COLLATE "C" NOT NULL,
    partition        integer NOT NULL,
    contract_version smallint NOT NULL,
    run              text COLLATE "C" NOT NULL,
    UNIQUE (source, partition, contract_version, run)
);

-- The readings. Values of the contract are further columns, nullable all of them: double precision
-- for numbers, text for the rest; the sink adds them as the contract grows, which rewrites nothing.
-- Columns of its own begin with an underscore, as no field of a contract does.
--
-- The key is the identity of a reading, and what makes "exactly once" hold against anybody: two
-- workers, a backfill, a hand-written INSERT. device_id comes first since operations ask for a
-- device's last hours: one range of the index. ts must be in it, as the table is divided by it.
CREATE TABLE {schema}.readings (
    device_id        text COLLATE "C" NOT NULL,
    ts               timestamptz NOT NULL,
    -- Unknown fields. extras is for queries; _extras_text is there only where jsonb would not give
    -- the same letters back (1e22, a backslash, U+0000) and is then what equality is decided on.
    extras           jsonb,
    _extras_text     text COLLATE "C",
    _ingested_at     timestamptz NOT NULL,
    _offset          bigint NOT NULL,
    _lineage         integer NOT NULL,
    PRIMARY KEY (device_id, ts)
) {divided};

-- All devices in a span of time: rows arrive in about the order of time, so a block's range of
-- times is narrow, and 24 bytes for 32 blocks do what a second B-tree would for 40 bytes a row.
CREATE INDEX readings_ts ON {schema}.readings
    USING brin (ts) WITH (pages_per_range = 32, autosummarize = on);

-- Events that were refused. The key makes reading an event again harmless: one letter a position.
CREATE TABLE {schema}.dead_letters (
    source           text COLLATE "C" NOT NULL,
    partition        integer NOT NULL,
    event_offset     bigint NOT NULL,
    payload          bytea,           -- the raw bytes; NULL: the event had none (a tombstone)
    key              bytea,
    headers          json NOT NULL,   -- [[name, hexadecimal or null], …]; json, as jsonb refuses U+0000
    codes            text[] NOT NULL, -- the reasons' codes, for selecting
    reasons          json NOT NULL,   -- [[code, field, found], …]
    device_id        text COLLATE "C" NOT NULL, -- '' where it could not be made out
    ts               timestamptz,     -- NULL where it could not be made out
    first_seen_at    timestamptz NOT NULL,
    contract_version smallint NOT NULL,
    run              text NOT NULL,
    state            text NOT NULL CHECK (state IN ('open', 'replayed', 'discarded')),
    replays          integer NOT NULL,
    PRIMARY KEY (source, partition, event_offset)
);

-- What is open is what people look at; what was replayed or discarded only adds up.
CREATE INDEX dead_letters_open ON {schema}.dead_letters (source, partition, event_offset)
    WHERE state = 'open';

-- Figures of quality, added up. Rows change over and over: room in each block keeps the new version
-- beside the old one, and since no index holds `value`, no index is touched (HOT).
CREATE TABLE {schema}.counts (
    device_id        text COLLATE "C" NOT NULL,
    hour             timestamptz NOT NULL,
    name             text COLLATE "C" NOT NULL,
    value            bigint NOT NULL,
    PRIMARY KEY (device_id, hour, name)
) WITH (fillfactor = 70);

-- Which devices there are, and the newest hour of each that has readings: one probe a device
-- for the view `latest`, however long the history is.
CREATE INDEX counts_stored ON {schema}.counts (device_id, hour DESC) WHERE name = 'stored';

-- How far each place was read and who may go on. Its rows are locked by each commit first of all:
-- that is the fence. worker: the application_name of the session that claimed it last.
CREATE TABLE {schema}.places (
    source           text COLLATE "C" NOT NULL,
    partition        integer NOT NULL,
    next             bigint NOT NULL,  -- -1: claimed, never committed
    token            text NOT NULL,
    epoch            bigint NOT NULL,
    worker           text NOT NULL,
    updated_at       timestamptz NOT NULL,
    PRIMARY KEY (source, partition)
) WITH (fillfactor = 50);

-- One row a commit: how a commit whose reply was lost is looked for, and a log for operations.
CREATE TABLE {schema}.commits (
    commit_id        text COLLATE "C" PRIMARY KEY,
    run              text NOT NULL,
    committed_at     timestamptz NOT NULL,
    contract_version smallint NOT NULL,
    stored           bigint NOT NULL,
    duplicates       bigint NOT NULL,
    rejected         bigint NOT NULL,
    conflicts        bigint NOT NULL
);

-- For dropping old rows only.
CREATE INDEX commits_at ON {schema}.commits USING brin (committed_at);


-- ## hypertable
-- With TimescaleDB: chunks of a day, made by the extension. No index of its own: there is ours.

SELECT {extension}.create_hypertable({readings}, 'ts', chunk_time_interval => INTERVAL '1 day',
    create_default_indexes => FALSE);


-- ## day
-- Without: one partition a day, made ahead of the batch. Made on its own and then attached, since
-- CREATE TABLE … PARTITION OF would lock out everybody who reads, ATTACH locks out nobody. No default
-- partition: with one, each new day would scan it, and what went there by mistake would stay.

CREATE TABLE {schema}.{day} (LIKE {schema}.readings INCLUDING ALL);
ALTER TABLE {schema}.readings ATTACH PARTITION {schema}.{day} FOR VALUES FROM ({start}) TO ({stop});


-- ## views
-- Made again whenever the contract grows.

-- The newest reading of each device: a walk over the devices by the index counts_stored, then one
-- probe into the hour that has it. DISTINCT ON would read everything.
CREATE OR REPLACE VIEW {schema}.latest AS
WITH RECURSIVE newest AS (
    (SELECT device_id, hour FROM {schema}.counts
     WHERE name = 'stored' ORDER BY device_id, hour DESC LIMIT 1)
    UNION ALL
    SELECT following.device_id, following.hour
    FROM newest CROSS JOIN LATERAL (
        SELECT device_id, hour FROM {schema}.counts
        WHERE name = 'stored' AND counts.device_id > newest.device_id
        ORDER BY device_id, hour DESC LIMIT 1) AS following
)
SELECT reading.*
FROM newest CROSS JOIN LATERAL (
    SELECT * FROM {schema}.readings
    WHERE readings.device_id = newest.device_id
        AND ts >= newest.hour AND ts < newest.hour + INTERVAL '1 hour'
    ORDER BY ts DESC LIMIT 1) AS reading;

-- By device and five minutes. Filter by device_id and by `hour`, not by `bucket`: those two lead to
-- the few hours that are asked for, each of them one range of the key.
CREATE OR REPLACE VIEW {schema}.rollup_5m AS
SELECT counts.device_id, counts.hour, bucket.*
FROM {schema}.counts CROSS JOIN LATERAL (
    SELECT date_bin(INTERVAL '5 minutes', ts, counts.hour) AS bucket, count(*) AS readings{rollups}
    FROM {schema}.readings
    WHERE readings.device_id = counts.device_id
        AND ts >= counts.hour AND ts < counts.hour + INTERVAL '1 hour'
    GROUP BY 1) AS bucket
WHERE counts.name = 'stored';

-- Readings with their lineage spelled out.
CREATE OR REPLACE VIEW {schema}.traced AS
SELECT lineages.source AS _source, lineages.partition AS _partition, lineages.run AS _run,
    lineages.contract_version AS _contract_version, readings.*
FROM {schema}.readings JOIN {schema}.lineages ON lineages.lineage = readings._lineage;


-- ## staged
-- For readings that may be there already, in the session's own memory; emptied by each commit. Its
-- name stands for its columns: one that lacks a new column is left alone.

CREATE TEMPORARY TABLE IF NOT EXISTS {staged} (LIKE {schema}.readings, _row integer NOT NULL)
    ON COMMIT DELETE ROWS;

"""Pictures show what is stored: counts, means and gaps held against the rows themselves."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.text import Text

import kvstore
from kvstore import plots
from kvstore import survey as surveys
from kvstore.errors import DamageError, KvstoreError, StoreFormatError
from kvstore.plots import digest as digests
from kvstore.plots.digest import digest
from kvstore.plots.rows import find_row
from kvstore.schema import Field, Schema
from kvstore.segment import Segment
from kvstore.survey import BINS, rough_rates, scan_of, survey

T0 = 1771342357.25  # 2026-02-17 15:32:37.25 UTC
HOUR = 3600.0
ROOM = Schema(
    (
        Field("time", "float64"),
        Field("volts", "float64", unit="V"),
        Field("door", "bool"),
        Field("note", "text"),
        Field("wave", "float32", (5,), unit="dB"),
        Field("seen", "datetime64[us]"),
        Field("took", "timedelta64[ms]"),
        Field("z", "complex64"),
    )
)


def room_rows(times):
    n = len(times)
    rng = np.random.default_rng(int(times[0]))
    return {
        "time": times,
        "volts": rng.normal(5, 1, n),
        "door": np.arange(n) % 2 == 0,
        "note": np.array(["x"] * n, object),
        "wave": rng.normal(0, 1, (n, 5)).astype("f4"),
        "seen": (times * 1e6).astype("i8").view("M8[us]"),
        "took": np.arange(n).view("m8[ms]"),
        "z": (rng.normal(size=n) + 1j).astype("c8"),
    }


def room_store(path, *parts):
    """A store of one stream ``room``, a batch for each part."""
    with kvstore.open(path, mode="w", flush_interval_s=None) as store:
        stream = store.stream("room", ROOM)
        for times in parts:
            stream.append(room_rows(times))
            store.flush()
    return path


def sensor_times(hours=10, hole=(4, 5)):
    """One row in ten seconds, but for the hole, in hours."""
    times = T0 + np.arange(0, hours * HOUR, 10)
    return times[(times < T0 + hole[0] * HOUR) | (times > T0 + hole[1] * HOUR)]


@pytest.fixture
def room(path):
    times = sensor_times()
    with kvstore.open(room_store(path, *np.array_split(times, 9))) as store:
        yield store


@pytest.fixture
def particles(path):
    """Ten packets of 20 particles, a second apart."""
    with kvstore.open(path, mode="w", flush_interval_s=None) as store:
        rng = np.random.default_rng(1)
        for packet in range(10):
            store.stream("particles").append(
                {
                    "timestamps": np.full(20, T0 + packet),
                    "scattering": rng.poisson(9, (20, 6, 4)).astype("i4"),
                    "spectral": rng.poisson(3, (20, 3, 4)).astype("i4"),
                }
            )
            store.flush()  # a batch each
    with kvstore.open(path) as store:
        yield store


def panel(figure, label):
    """The panel whose y axis says so."""
    found = [axes for axes in figure.axes if axes.get_ylabel().replace("\n", " ") == label]
    assert len(found) == 1, [axes.get_ylabel() for axes in figure.axes]
    return found[0]


def words(figure):
    """All text of a figure but tick labels, which come into being as they are drawn."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def images(figure):
    return [image for axes in figure.axes for image in axes.get_images()]


# ---- the survey ----


def test_bins_count_every_row_once_however_batches_lie(path):
    rng = np.random.default_rng(1)
    parts = [np.sort(rng.uniform(T0 + k * 5, T0 + k * 5 + 60, 70)) for k in rng.permutation(40)]
    with kvstore.open(room_store(path, *parts)) as store:
        for ends in [(None, None), (T0 + 33.3, T0 + 181.8)]:
            found = survey(scan_of(store["room"], *ends))
            times = np.concatenate(parts)
            times = times[(times >= (ends[0] or 0)) & (times <= (ends[1] or np.inf))]
            edges = found.span.edges_s()
            assert found.total_rows == len(times) == store["room"].count(*ends)
            expected = np.histogram(times - found.span.start_ns / 1e9, edges)[0]
            assert abs(found.rows - expected).sum() <= 4  # at an edge by a rounding


def test_a_hole_is_a_silence_and_irregular_arrival_is_not(path):
    rng = np.random.default_rng(1)
    times = T0 + np.cumsum(rng.exponential(1.0, 5000))
    times = times[(times < T0 + 1000) | (times > T0 + 1100)]
    with kvstore.open(room_store(path, times)) as store:
        (found,) = survey(scan_of(store["room"])).silences()
    width = (times[-1] - times[0]) / BINS
    assert found == pytest.approx((1000, 1100), abs=3 * width)


def test_a_packet_of_many_particles_at_one_time_is_one_event(particles):
    """Else ten packets in 1,024 bins would be nine silences."""
    found = survey(scan_of(particles["particles"]))
    assert found.events.sum() == 10
    assert found.silences() == []


def test_silences_reach_into_the_range_from_outside(room):
    middle = T0 + 4.5 * HOUR
    found = survey(scan_of(room["room"], middle, T0 + 8 * HOUR))
    ((start, stop),) = found.silences()
    assert start == 0
    assert stop == pytest.approx(HOUR / 2, abs=30)


def test_steps_keep_all_rows_and_give_silences_bins_of_their_own(room):
    found = survey(scan_of(room["room"]))
    edges, rows = found.steps(64)
    assert rows.sum() == found.total_rows
    ((start, stop),) = found.silences()
    at = edges.tolist().index(start)
    assert edges[at + 1] == stop
    assert rows[at] == 0
    assert np.diff(edges)[rows > 0].min() > 0.4 * np.diff(edges)[rows > 0].max()


@pytest.mark.parametrize("index_records", [4000, 0])
def test_rough_rates_are_about_right_with_and_without_reading_the_index(
    room, monkeypatch, index_records
):
    monkeypatch.setattr(surveys, "_ROUGH_BATCHES", index_records)
    rates = rough_rates(room["room"], 20)
    span_s = 10 * HOUR - 10
    assert rates.sum() * span_s / 20 == pytest.approx(len(room["room"]), rel=0.01)
    if index_records:
        assert rates[9] < 0.08
        assert rates[[0, 5, 15]] == pytest.approx(0.1, rel=0.05)


def test_rough_rates_of_many_sealed_segments_come_from_their_summaries(path, monkeypatch):
    with kvstore.open(path, mode="w", segment_bytes=1 << 16) as store:
        for k in range(200):
            times = T0 + 10 * k + np.arange(10.0)
            noise = np.random.default_rng(k).normal(size=(10, 100))
            store.stream("s").append({"time": times, "noise": noise})
            store.flush()
    opened = []
    with kvstore.open(path) as store:
        segments = store.info().segments
        open_segment = store.open_segment
        monkeypatch.setattr(store, "open_segment", lambda n: opened.append(n) or open_segment(n))
        assert rough_rates(store["s"], 4) == pytest.approx(1, rel=0.01)
    assert segments > 5
    assert len(opened) <= 3  # those that straddle two bins


@pytest.mark.parametrize("asked", range(12))
def test_rough_rates_keep_all_rows_wherever_they_get_late(room, asked):
    turns = iter(range(100))
    rates = rough_rates(room["room"], 4, is_late=lambda: next(turns) >= asked)
    assert rates.mean() == pytest.approx(0.09, rel=0.01)
    assert (rates.std() > 0.001) == (asked > 10)  # even, or with its silence


def test_rough_rates_of_a_segment_that_cannot_be_read_come_from_its_summary(room, monkeypatch):
    def unreadable(*_, **__):
        raise StoreFormatError("torn")

    monkeypatch.setattr(Segment, "entries", unreadable)
    assert rough_rates(room["room"], 4) == pytest.approx(0.09, rel=0.02)


def test_a_stream_without_a_stretch_of_time_has_no_rates(path):
    with kvstore.open(path, mode="w") as store:
        store.stream("room", ROOM)
        assert len(rough_rates(store["room"], 8)) == 0
        store.stream("room").append(room_rows(np.array([T0])))
        store.flush()
        assert len(rough_rates(store["room"], 8)) == 0


# ---- what fields hold ----


def summary_of(stream, *names, percentiles=(5.0, 50.0, 95.0)):
    scan = scan_of(stream)
    fields = [stream.schema.fields[stream.schema.number(name)] for name in names]
    return digest(scan, survey(scan), fields, percentiles, lambda _: None)


def test_lines_and_elements_agree_with_numpy(room):
    rows = {
        name: np.concatenate([batch[name] for batch in room["room"].read()])
        for name in ("volts", "wave")
    }
    found = summary_of(room["room"], "volts", "wave")
    volts, wave = found.fields
    assert found.rows == len(rows["volts"])
    assert volts.low.min() == rows["volts"].min()
    assert volts.high.max() == rows["volts"].max()
    assert np.all((volts.low <= volts.mean) & (volts.mean <= volts.high))
    assert wave.mean == pytest.approx(rows["wave"].mean(axis=0), abs=1e-6)
    for rank, values in wave.percentiles.items():
        expected = np.percentile(rows["wave"], rank, axis=0, method="nearest")
        assert values == pytest.approx(expected, abs=5e-3)


def test_missing_values_are_counted_and_left_out_and_lift_the_pen(path):
    times = T0 + np.arange(0, 2000.0, 10)
    rows = room_rows(times)
    rows["volts"][50:60] = np.nan
    rows["volts"][60] = np.inf
    rows["wave"][:, 2] = np.nan
    with kvstore.open(path, mode="w") as store:
        store.stream("room", ROOM).append(rows)
        store.flush()
        volts, wave = summary_of(store["room"], "volts", "wave").fields
        figure = plots.overview(store, "room", fields=["volts"])
    assert volts.missing == 11
    assert np.isfinite(volts.mean).all()
    assert len(volts.breaks) == 11
    assert np.isnan(wave.mean).tolist() == [False, False, True, False, False]
    assert np.isnan(wave.percentiles[50.0]).tolist() == [False, False, True, False, False]
    line = panel(figure, "volts / V").get_lines()[0]
    seconds = (line.get_xdata() * 86400 - T0)[np.isnan(line.get_ydata())]
    assert all(500 <= second <= 610 for second in seconds)
    assert len(seconds) == 11
    assert "not finite: volts 11" in words(figure)


def test_a_field_added_later_is_drawn_from_where_it_begins(path):
    with kvstore.open(path, mode="w") as store:
        stream = store.stream("s")
        stream.append({"time": T0 + np.arange(100.0), "a": np.arange(100)})
        store.flush()
        stream.add_fields(Field("b", "int32"))  # no honest fill
        stream.append({"time": T0 + 100 + np.arange(100.0), "a": np.arange(100), "b": [7] * 100})
        store.flush()
        (found,) = summary_of(store["s"], "b").fields
    assert found.missing == 100
    assert found.seconds.min() >= 99.5
    assert set(found.mean) == {7.0}


def test_of_a_long_range_a_seeded_part_is_read_and_the_figure_says_so(particles, monkeypatch):
    monkeypatch.setattr(digests, "READ_BYTES_MAX", 200 * 152 // 2)  # half of all
    monkeypatch.setattr(digests, "SAMPLE_BYTES_MAX", 30 * 96)
    found = summary_of(particles["particles"], "scattering")
    (scattering,) = found.fields
    assert 60 <= found.rows <= 140
    assert scattering.sampled_rows <= 31
    again = summary_of(particles["particles"], "scattering")
    assert np.array_equal(again.fields[0].mean, scattering.mean)
    said = words(plots.overview(particles, "particles", fields=["scattering"]))
    assert "random sample, evenly over time" in said
    assert f"{found.rows:,} of 200 rows" in said
    assert f"percentiles of {scattering.sampled_rows:,} drawn" in said


def test_every_batch_has_the_same_chance_to_be_read(particles):
    """Counted over many seeds; a part of each stretch of time is always read."""
    scan = scan_of(particles["particles"])
    counts = np.zeros(10)
    for seed in range(300):
        digests.SEED, kept = seed, digests.SEED
        try:
            drawn = [number for number, _ in digests._drawn(scan, 2.5)]
        finally:
            digests.SEED = kept
        assert len(drawn) in (3, 4, 5)
        counts[drawn] += 1
    assert counts / 300 == pytest.approx(0.4, abs=0.1)


# ---- figures ----


def test_particles_get_a_rate_and_images_of_mean_and_percentiles(particles):
    figure = plots.overview(particles, "particles", percentiles=(10, 50))
    columns = {
        name: np.concatenate([batch[name] for batch in particles["particles"].read()])
        for name in ("scattering", "spectral")
    }
    shown = [image.get_array() for image in images(figure)]
    for at, name in ((0, "scattering"), (3, "spectral")):
        mean, low, median = shown[at : at + 3]
        assert np.allclose(mean, columns[name].mean(axis=0))
        nearest = [np.percentile(columns[name], p, axis=0, method="nearest") for p in (10, 50)]
        assert abs(low - nearest[0]).max() <= 1
        assert abs(median - nearest[1]).max() <= 1
    said = words(figure)
    assert "200 particles from 2026-02-17 15:32:37.25 to 15:32:46.25 UTC" in said
    assert "Time after 2026-02-17 15:32:37.25 UTC / s" in said
    assert "particles per s" in said
    assert "scattering\nfirst index" in said
    assert "drawn from them" not in said  # all rows are in the picture


def test_every_kind_of_field_gets_its_panel_with_its_unit_and_text_gets_none(room):
    figure = plots.overview(room, "room")
    figure.draw_without_rendering()
    said = words(figure)
    labels = ["volts / V", "door", "wave / dB", "seen", "took / ms", "magnitude of z"]
    for label in labels:
        panel(figure, label)
    assert "Time / UTC" in said
    assert "rows per min" in said
    assert "Not shown: note." in said
    assert "true" in said
    assert panel(figure, "seen").get_lines()[0].get_ydata()[0] * 86400 == pytest.approx(T0, abs=60)


def test_a_gap_is_shaded_and_never_bridged_by_a_line(room):
    figure = plots.overview(room, "room", fields=["volts"])
    line = panel(figure, "volts / V").get_lines()[0]
    seconds, values = line.get_xdata() * 86400 - T0, line.get_ydata()
    before = np.flatnonzero(seconds < 4 * HOUR + 60)[-1]
    assert np.isnan(values[before + 1])
    assert seconds[before + 2] > 5 * HOUR - 60
    assert shaded(figure, "no data") == [pytest.approx((4 * HOUR, 5 * HOUR), abs=60)]
    assert "no data" in words(figure)


def shaded(figure, kind):
    """Ends in seconds after T0 of what is shaded as that, in every panel the same."""
    found = {}
    for axes in figure.axes:
        for collection in axes.collections:
            if collection.get_label() == kind:
                xs = [path.vertices[:, 0] * 86400 - T0 for path in collection.get_paths()]
                found[axes] = [(x.min(), x.max()) for x in xs]
    assert list(found) == (figure.axes if found else [])
    first, *others = found.values() or [[]]
    assert all(other == first for other in others)
    return first


def test_gaps_that_the_store_recorded_are_shaded_by_kind(path):
    ends = {"start_ns": round((T0 + 600) * 1e9), "stop_ns": round((T0 + 700) * 1e9)}
    with kvstore.open(path, mode="w", settings=kvstore.Settings(gap_after_s=15)) as store:
        stream = store.stream("room", ROOM)
        for at in (0, 1000, 3000, 4020, 2000):  # the last comes late, and fills its silence
            stream.append(room_rows(T0 + at + np.arange(0, 1000, 10.0)))
        store.note_gap("unclean_stop", **ends)
        store.note_gap("damaged", "other", **ends)
        store.note_gap("clock_ahead", "room", **ends)
        store.note_gap("rejected", "room", start_ns=0, stop_ns=10)
        store.flush()
        kinds = [gap.kind for gap in store.gaps() if gap.stream in ("", "room")]
        assert kinds.count("silence") > 1
        figure = plots.overview(store, "room", fields=["volts"])
    assert shaded(figure, "unclean stop") == [pytest.approx((600, 700), abs=0.01)]
    assert shaded(figure, "no data") == [pytest.approx((3990, 4020), abs=0.01)]
    assert shaded(figure, "clock ahead") == [pytest.approx((700, 700), abs=0.01)]
    assert shaded(figure, "damaged") == []  # of another stream
    assert shaded(figure, "rejected") == []  # long before


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([T0], "1 row at 2026-02-17 15:32:37.25 UTC"),
        ([T0] * 3, "3 rows, all at 2026-02-17 15:32:37.25 UTC"),
        ([T0, T0 + 600], "2 rows from 2026-02-17 15:32:37.25 to 15:42:37.25 UTC"),
    ],
)
def test_very_few_rows_still_make_a_picture(path, times, said):
    with kvstore.open(room_store(path, np.array(times))) as store:
        figure = plots.overview(store, "room")
        shown = words(figure)
        assert said in shown
        assert "volts / V" in shown
        if times[0] == times[-1]:
            assert "seen:  2026-02-17 15:32:37.25 UTC" in shown


def test_an_empty_range_says_so_and_where_rows_are(room):
    said = words(plots.overview(room, "room", "2030-01-01"))
    assert "No rows in this range." in said
    assert "The stream has rows from 2026-02-17 15:32:37.25" in said


def test_an_empty_stream_says_so(path):
    with kvstore.open(path, mode="w") as store:
        store.stream("room", ROOM)
        assert "The stream has no rows yet." in words(plots.overview(store, "room"))


def test_a_range_of_a_microsecond_has_an_axis_that_can_be_read(path):
    rows = {"time": 1771342357000000000 + np.arange(100) * 10, "v": np.arange(100.0)}
    with kvstore.open(path, mode="w") as store:
        store.stream("adc").append(rows)
        store.flush()
        figure = plots.overview(store, "adc")
    assert figure.axes[-1].get_xlabel() == "Time after 2026-02-17 15:32:37 UTC / ns"
    assert figure.axes[-1].get_lines()[0].get_xdata()[[0, -1]].tolist() == [0, 990]


@pytest.mark.parametrize("last", [1e3, 1e9 * 8])
def test_stray_stamps_and_long_ranges_draw(path, last):
    times = np.r_[T0 + np.arange(50.0), last]
    with kvstore.open(room_store(path, np.sort(times))) as store:
        assert "51 rows" in words(plots.overview(store, "room", fields=["volts", "seen"]))


def test_names_and_units_are_no_markup(path):
    schema = Schema((Field("time", "float64"), Field("cost_$a$", "float64", unit="$^$")))
    with kvstore.open(path, mode="w") as store:
        store.stream("$x$", schema).append({"time": [T0, T0 + 1], "cost_$a$": [1.0, 2.0]})
        store.flush()
        figure = plots.overview(store, "$x$")
    panel(figure, "cost_$a$ / $^$")
    figure.savefig(io.BytesIO())  # mathtext would fail to parse it


def test_axes_of_length_one_and_more_than_two_axes_are_flattened(path):
    rng = np.random.default_rng(1)
    rows = {
        "time": T0 + np.arange(9.0),
        "one": rng.normal(size=(9, 1)),
        "column": rng.normal(size=(9, 7, 1)),
        "cube": rng.normal(size=(9, 2, 3, 4)),
        "none": rng.normal(size=(9, 0)),
    }
    with kvstore.open(path, mode="w") as store:
        store.stream("s").append(rows)
        store.flush()
        figure = plots.overview(store, "s")
    panel(figure, "one").get_lines()
    assert len(panel(figure, "column").get_lines()[0].get_ydata()) == 7
    assert images(figure)[0].get_array().shape == (2, 12)
    assert "Not shown: none." in words(figure)


def test_of_many_fields_twelve_are_drawn_unless_others_are_named(path):
    row = {"time": T0} | {f"f{n}": float(n) for n in range(20)}
    with kvstore.open(path, mode="w") as store:
        store.stream("s").append(row)
        store.stream("s").append({**row, "time": T0 + 1})
        store.flush()
        assert len(plots.overview(store, "s").axes) == 1 + 12
        assert "Not shown: f12, f13, f14, f15 and 4 more." in words(plots.overview(store, "s"))
        figure = plots.overview(store, "s", fields=["f19", "f3"])
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["f19", "f3"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fields": ["note"]}, "'note'.* has no picture"),
        ({"fields": ["nope"]}, "no field 'nope'"),
        ({"percentiles": [101]}, "0 to 100"),
        ({"size_in": (3, 20)}, "too small for its panels: they need 4 x"),
        ({"size_in": (10, 1)}, "too small"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_a_way_out(room, options, said):
    with pytest.raises(KvstoreError, match=said):
        plots.overview(room, "room", **options)


def test_the_size_asked_for_is_the_size_drawn(particles):
    figure = plots.overview(particles, "particles", size_in=(6, 7))
    assert figure.get_size_inches().tolist() == [6, 7]
    file = io.BytesIO()
    figure.savefig(file, dpi=50, format="png")
    width, height = np.frombuffer(file.getvalue()[16:24], ">u4")
    assert (width, height) == (300, 350)


# ---- one row ----


def test_every_row_of_a_range_can_be_had_by_its_number(particles):
    stream = particles["particles"]
    whole = np.concatenate([batch["scattering"] for batch in stream.read()])
    fields = stream.schema.fields[1:2]
    for ends, offset in [((None, None), 0), ((T0 + 3, T0 + 5), 60)]:
        for number in range(stream.count(*ends)):
            found = find_row(scan_of(stream, *ends), number, fields)
            assert np.array_equal(found.values["scattering"][0], whole[offset + number])


def test_a_row_is_found_by_the_index_and_only_its_batch_is_read(particles, monkeypatch):
    fetched = []
    fetch = Segment.fetch

    def noted(self, entry, wanted, **options):
        fetched.append(entry.sequence)
        return fetch(self, entry, wanted, **options)

    monkeypatch.setattr(Segment, "fetch", noted)
    plots.row(particles, "particles", 130)
    assert len(set(fetched)) == 1


def test_a_particle_is_shown_with_its_number_and_time(particles):
    figure = plots.row(particles, "particles", -1)
    last = [batch["scattering"] for batch in particles["particles"].read()][-1][-1]
    assert np.array_equal(images(figure)[0].get_array(), last)
    assert "Particle 199, 2026-02-17 15:32:46.25 UTC" in words(figure)


def test_a_row_of_scalars_is_shown_in_words(room):
    said = words(plots.row(room, "room", 1))
    assert "seen:  2026-02-17 15:32:47.250000 UTC" in said
    assert "door:  False" in said
    assert "took / ms:  1" in said
    assert "Row 1, 2026-02-17 15:32:47.25 UTC" in said
    assert "note" in said.split("Not shown: ")[1]


@pytest.mark.parametrize("number", [200, -201])
def test_a_row_that_is_not_there_is_refused(particles, number):
    with pytest.raises(KvstoreError, match="has 200 rows, numbered from 0"):
        plots.row(particles, "particles", number)


# ---- damage ----


def with_damage(path, number):
    """A store whose first batch has a damaged block, of the field of that number."""
    room_store(path, *np.array_split(sensor_times(), 3))
    with kvstore.open(path) as store:
        (segment, entry), *_ = scan_of(store["room"]).entries()
        with segment.environment.read() as txn:
            key = entry.key + number.to_bytes(2, "big")
            block = bytes(txn.get(key, db=segment.environment.blocks))
    file = path / "segments" / "00000001.mdb"
    data = file.read_bytes()
    assert block in data
    file.write_bytes(data.replace(block, block[:100] + bytes(20) + block[120:]))
    return kvstore.open(path)


@pytest.mark.parametrize("number", [0, 1])
def test_damage_is_reported_once_and_noted_in_the_figure(broken_path, number):
    """Of the time, which both passes read, or of a field."""
    with with_damage(broken_path, number) as store:
        with pytest.raises(DamageError):
            plots.overview(store, "room", fields=["volts"])
        seen = []
        figure = plots.overview(store, "room", fields=["volts"], on_damage=seen.append)
        assert len(seen) == 1
        assert "1 damaged part left out" in words(figure)
        assert "sample" not in words(figure)


def test_damage_of_one_field_leaves_the_others_alone(broken_path):
    with with_damage(broken_path, 1) as store:
        assert "damaged" not in words(plots.overview(store, "room", fields=["door"]))
        assert len(rough_rates(store["room"], 8)) == 8


# ---- imports ----


def test_without_matplotlib_the_error_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = None
import kvstore
try:
    import kvstore.plots
except kvstore.KvstoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = "plotting needs matplotlib, which is not installed: pip install 'kvstore[plot]'\n"
    assert done.stdout == said


def test_figures_use_no_global_state():
    code = "import sys, kvstore.plots; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

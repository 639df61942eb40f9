"""The lake as a sink does what every sink does: the conformance suite and the model."""

from __future__ import annotations

import pytest
from lakes import fresh_lake
from sink_conformance import SinkConformance
from telemetry_model import check_sink_against_model


class TestIcebergSink(SinkConformance):
    examples = 3  # a commit is some 30 ms; more of them below

    @pytest.fixture
    def fresh(self):
        return fresh_lake


@pytest.mark.slow
def test_it_does_as_the_model_at_length():
    check_sink_against_model(fresh_lake, examples=25)

from cli.terminal.line_plots import curves


def test_a_curve_rises_with_its_values_and_stays_within_its_range() -> None:
    drawn = curves([0.25, 0.75], {"lru": [0.0, 1.0]}, width=40, height=10).splitlines()
    rows = [line.split("│")[1] for line in drawn if "│" in line]
    assert len(rows) == 10
    places = [row.index("l") for row in rows if "l" in row]
    assert places == sorted(places, reverse=True)
    assert min(places) >= 10 and max(row.rindex("l") for row in rows if "l" in row) < 30


def test_every_series_has_a_letter_of_its_own() -> None:
    legend = curves([0.0, 1.0], {"lru": [0, 1], "lfu": [1, 0], "l": [0.5, 0.5]}).splitlines()[-1]
    letters = [part.split()[0] for part in legend.split("   ") if part.strip()]
    assert len(set(letters)) == 3

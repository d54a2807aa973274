import pytest

from pybatch.base.errors import UsageError
from pybatch.base.ranges import parse_batches


@pytest.mark.parametrize(
    ("text", "batches"),
    [
        ("32", [32]),
        ("8,1,2,8", [1, 2, 8]),
        ("8-64*2", [8, 16, 32, 64]),
        ("8-65*2", [8, 16, 32, 64]),
        ("2-9*1.5", [2, 3, 4, 7]),
        ("16-64+16", [16, 32, 48, 64]),
        ("7-7*2", [7]),
        ("1, 4-8+2 ,100", [1, 4, 6, 8, 100]),
    ],
)
def test_batches_of_a_range(text, batches):
    assert parse_batches(text) == batches


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8-4*2", "start 8 is above stop 4. Write '4-8*2'."),
        ("", "'' is not a batch size"),
        ("8-", "'8-' is not a batch size"),
        ("8-64", "'8-64' is not a batch size"),
        ("-8", "'-8' is not a batch size"),
        ("0", "0 is below 1"),
        ("0-8*2", "start 0 is below 1"),
        ("8-64*1", "factor 1 does not grow"),
        ("8-64*0.5", "factor 0.5 does not grow"),
        ("8-64+0", "step 0 is not a whole number"),
        ("8-64+1.5", "step 1.5 is not a whole number"),
        ("1-100000+1", "over 1000 batch sizes"),
        ("1-1000000*1.0001", "over 1000 batch sizes"),
        ("٣٢", "is not a batch size"),
        ("many", "'many' is not a batch size"),
    ],
)
def test_a_malformed_range_says_what_to_write(text, says):
    with pytest.raises(UsageError) as error:
        parse_batches(text)
    assert says in str(error.value)
    assert repr(text) in str(error.value)

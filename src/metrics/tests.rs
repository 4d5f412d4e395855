use super::*;

#[test]
fn numbers_are_written_as_python_does() {
    for (value, text) in [
        (0.0, "0.0"),
        (1.0, "1.0"),
        (0.3, "0.3"),
        (7680.0, "7680.0"),
        (200_000.0, "200000.0"),
        (1_000_000.0, "1e+06"),
        (1_792_992.5, "1.7929925e+06"),
        (f64::INFINITY, "+Inf"),
    ] {
        assert_eq!(number(value), text);
    }
}

#[test]
fn request_buckets_end_at_the_context() {
    assert_eq!(one_two_five(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    assert_eq!(one_two_five(1), [1.0]);
    assert_eq!(one_two_five(0), [1.0]);
}

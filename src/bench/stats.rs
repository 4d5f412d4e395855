//! Figures of a sample, as numpy computes them.

/// 0 for an empty sample.
pub fn mean(values: &[f64]) -> f64 {
    match values.len() {
        0 => 0.0,
        count => values.iter().sum::<f64>() / count as f64,
    }
}

/// Of the population; 0 for an empty sample.
pub fn standard_deviation(values: &[f64]) -> f64 {
    let center = mean(values);
    let squares: Vec<f64> = values.iter().map(|value| (value - center).powi(2)).collect();
    mean(&squares).sqrt()
}

/// The value below which `percent` of the sample lies, between two values by linear interpolation; 0 for an empty sample.
pub fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let position = last as f64 * percent / 100.0;
    let below = (position.floor() as usize).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (position - below as f64)
}

/// What is reported of a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub mean: f64,
    pub median: f64,
    pub std: f64,
    /// (percent, value)
    pub percentiles: Vec<(f64, f64)>,
}

impl Summary {
    pub fn new(values: &[f64], percents: &[f64]) -> Self {
        Self {
            mean: mean(values),
            median: percentile(values, 50.0),
            std: standard_deviation(values),
            percentiles: percents
                .iter()
                .map(|&percent| (percent, percentile(values, percent)))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against numpy.
    #[test]
    fn figures_are_numpys() {
        let values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0];
        let summary = Summary::new(&values, &[25.0, 99.0, 100.0]);
        assert_eq!((summary.mean, summary.median), (3.875, 3.5));
        assert!((summary.std - 2.570_870_475_150_391_7).abs() < 1e-12);
        assert_eq!(summary.percentiles[0], (25.0, 1.75));
        assert!((summary.percentiles[1].1 - 8.79).abs() < 1e-12);
        assert_eq!(summary.percentiles[2].1, 9.0);
        assert_eq!(Summary::new(&[], &[50.0]), Summary::new(&[0.0], &[50.0]));
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
    }
}

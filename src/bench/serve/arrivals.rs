//! When requests are sent: at once, at a rate with pauses of a gamma distribution, or at a rate that grows.

use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Gamma};

use crate::config::args::{Arrivals, Ramp};

/// Seconds after the start at which each of `count` requests is sent, ascending.
///
/// At a constant rate the pauses are scaled so that the last request is sent at `count / rate`, whatever was drawn.
pub fn delays_s(arrivals: &Arrivals, count: usize, seed: u64) -> Vec<f64> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut now = 0.0;
    let mut delays: Vec<f64> = (0..count)
        .map(|i| {
            now += match rate(arrivals, i, count) {
                None => 0.0,
                Some(rate) => pause_s(rate, arrivals.burstiness, &mut random),
            };
            now
        })
        .collect();
    if let (Some(rate), None) = (arrivals.rate, arrivals.ramp)
        && now > 0.0
    {
        let scale = count as f64 / rate / now;
        delays.iter_mut().for_each(|delay| *delay *= scale);
    }
    delays
}

/// Requests per second at the `index`-th of `count`; none = no pause.
fn rate(arrivals: &Arrivals, index: usize, count: usize) -> Option<f64> {
    let Some(Ramp {
        exponential,
        start_rps,
        end_rps,
    }) = arrivals.ramp
    else {
        return arrivals.rate;
    };
    let progress = index as f64 / count.saturating_sub(1).max(1) as f64;
    Some(match exponential {
        true => start_rps * (end_rps / start_rps).powf(progress),
        false => start_rps + (end_rps - start_rps) * progress,
    })
}

/// A pause with the mean 1 / `rate`.
fn pause_s(rate: f64, burstiness: f64, random: &mut StdRng) -> f64 {
    if burstiness.is_infinite() {
        return 1.0 / rate;
    }
    match Gamma::new(burstiness, 1.0 / (rate * burstiness)) {
        Ok(gamma) => gamma.sample(random),
        // Beyond what the distribution can be told apart from its mean.
        Err(_) => 1.0 / rate,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(rate: Option<f64>, burstiness: f64) -> Arrivals {
        Arrivals {
            rate,
            burstiness,
            ramp: None,
        }
    }

    #[test]
    fn without_a_rate_all_are_sent_at_once() {
        assert_eq!(delays_s(&at(None, 1.0), 3, 0), [0.0; 3]);
    }

    #[test]
    fn a_rate_is_met_exactly_and_reproducibly() {
        for burstiness in [0.3, 1.0, 5.0, f64::INFINITY] {
            let delays = delays_s(&at(Some(4.0), burstiness), 100, 7);
            assert!((delays[99] - 25.0).abs() < 1e-9, "{burstiness}: {}", delays[99]);
            assert!(delays.is_sorted());
            assert_eq!(delays, delays_s(&at(Some(4.0), burstiness), 100, 7));
        }
        assert_ne!(delays_s(&at(Some(4.0), 1.0), 9, 1), delays_s(&at(Some(4.0), 1.0), 9, 2));
    }

    /// The variation of gamma pauses is 1 / sqrt(burstiness) of their mean.
    #[test]
    fn burstiness_shapes_the_pauses() {
        let variation = |burstiness: f64| {
            let delays = delays_s(&at(Some(1.0), burstiness), 20_000, 3);
            let pauses: Vec<f64> = delays.windows(2).map(|pair| pair[1] - pair[0]).collect();
            crate::bench::stats::standard_deviation(&pauses) / crate::bench::stats::mean(&pauses)
        };
        for burstiness in [0.25, 1.0, 4.0] {
            let expected = 1.0 / f64::sqrt(burstiness);
            assert!((variation(burstiness) / expected - 1.0).abs() < 0.1, "{burstiness}");
        }
    }

    #[test]
    fn a_ramp_goes_from_its_start_to_its_end() {
        let ramp = |exponential, index| {
            let ramp = Ramp {
                exponential,
                start_rps: 1.0,
                end_rps: 16.0,
            };
            let arrivals = Arrivals {
                rate: None,
                burstiness: f64::INFINITY,
                ramp: Some(ramp),
            };
            rate(&arrivals, index, 5).unwrap()
        };
        assert_eq!([0, 2, 4].map(|i| ramp(false, i)), [1.0, 8.5, 16.0]);
        assert_eq!([0, 2, 4].map(|i| ramp(true, i)), [1.0, 4.0, 16.0]);
    }
}

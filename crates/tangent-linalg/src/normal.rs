//! Normal random numbers.

use rand::{Rng, RngExt};

/// A standard normal number (Box-Muller).
pub fn normal(rng: &mut impl Rng) -> f64 {
    let (u, v) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn moments_are_those_of_the_normal_distribution() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let values: Vec<f64> = (0..40_000).map(|_| normal(&mut rng)).collect();
        let mean = |power: i32| {
            let sum: f64 = values.iter().map(|v| v.powi(power)).sum();
            sum / values.len() as f64
        };
        // Standard errors: 0.005, 0.007, 0.02, 0.05.
        for (power, want, tolerance) in [
            (1, 0.0, 0.02),
            (2, 1.0, 0.03),
            (3, 0.0, 0.08),
            (4, 3.0, 0.2),
        ] {
            let got = mean(power);
            assert!((got - want).abs() < tolerance, "{power}: {got}");
        }
    }
}

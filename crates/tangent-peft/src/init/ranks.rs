//! Ranks that move between sites: where inputs vary in many directions there are more of them.
//!
//! Every site offers directions with the share of its inputs' variance that each explains; the
//! largest shares of all sites are taken, as many as there were ranks (EVA, 2410.07170).

use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::Factors;
use crate::targets::Targets;

/// What a site offers.
#[derive(Clone, Debug, PartialEq)]
pub struct Offer {
    /// Path of the site.
    pub site: String,
    /// Its rank by the settings.
    pub rank: usize,
    /// Shares of its inputs' variance that its directions explain, in their order.
    pub shares: Vec<f64>,
}

/// How many directions a site offers: `rho` times its rank, at most its smaller side.
pub fn offered(rank: usize, rho: f64, (rows, cols): (usize, usize)) -> usize {
    let most = (rank as f64 * rho).round() as usize;
    most.min(rows).min(cols).max(rank)
}

/// The share of the variance that each row of `a: (rank, d_in)` explains; `scatter: (d_in, d_in)`.
pub fn shares(a: &[f32], d_in: usize, scatter: &[f32]) -> Vec<f64> {
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
        products.sum()
    };
    let diagonal = scatter.iter().step_by(d_in + 1);
    let trace: f64 = diagonal.map(|v| f64::from(*v)).sum();
    let share = |row: &[f32]| {
        let along = row.iter().zip(scatter.chunks_exact(d_in));
        let variance: f64 = along.map(|(x, line)| f64::from(*x) * dot(row, line)).sum();
        let whole = trace * dot(row, row);
        if whole > 0.0 { variance / whole } else { 0.0 }
    };
    a.chunks_exact(d_in.max(1)).map(share).collect()
}

/// The sites' new ranks, 0 where no direction is taken. Of equal shares the earlier site's comes
/// first, so that sites with the same inputs keep their order.
pub fn redistributed(offers: &[Offer]) -> Vec<usize> {
    let ranks: usize = offers.iter().map(|offer| offer.rank).sum();
    let mut all: Vec<(usize, f64)> = vec![];
    for (site, offer) in offers.iter().enumerate() {
        all.extend(offer.shares.iter().map(|share| (site, *share)));
    }
    all.sort_by(|a, b| b.1.total_cmp(&a.1));
    let mut given = vec![0; offers.len()];
    for (site, _) in all.into_iter().take(ranks) {
        given[site] += 1;
    }
    given
}

/// Settles the ranks of the sites in the settings: sites of rank 0 are no targets any more, and
/// alpha changes as the rank does.
///
/// # Errors
/// If a pattern does not parse.
pub fn assign(config: &mut AdapterConfig, ranks: &[(String, usize)]) -> Result<(), PeftError> {
    let (mut rank_pattern, mut alpha_pattern, mut sites) = (vec![], vec![], vec![]);
    for (site, rank) in ranks.iter().filter(|(_, rank)| *rank > 0) {
        let before = config.rank_at(site)?;
        let alpha = config.alpha_at(site)? * *rank as f32 / before as f32;
        if *rank != config.rank {
            rank_pattern.push((site.clone(), *rank));
        }
        if alpha != config.alpha {
            alpha_pattern.push((site.clone(), alpha));
        }
        sites.push(site.clone());
    }
    config.rank_pattern = rank_pattern;
    config.alpha_pattern = alpha_pattern;
    config.targets = Targets::Names(sites);
    config.exclude = None;
    config.layers = None;
    Ok(())
}

/// The first `rank` rows of A and columns of B.
pub fn cut(factors: &mut Factors, from: usize, rank: usize) {
    let d_in = factors.a.len() / from.max(1);
    factors.a.truncate(rank * d_in);
    let rows = factors.b.chunks_exact(from.max(1));
    factors.b = rows
        .flat_map(|row| row.iter().copied().take(rank))
        .collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(site: &str, rank: usize, shares: &[f64]) -> Offer {
        Offer {
            site: site.into(),
            rank,
            shares: shares.to_vec(),
        }
    }

    #[test]
    fn the_largest_shares_are_taken_and_ranks_are_conserved() {
        let offers = [
            offer("a", 2, &[0.5, 0.2, 0.1, 0.05]),
            offer("b", 2, &[0.9, 0.01, 0.01, 0.01]),
            offer("c", 1, &[0.3, 0.2]),
        ];
        assert_eq!(redistributed(&offers), [2, 1, 2]);
        let none = [offer("a", 1, &[0.6, 0.5]), offer("b", 1, &[0.4, 0.1])];
        assert_eq!(redistributed(&none), [2, 0]);
        // Equal inputs: the earlier site first.
        let equal = [
            offer("q", 2, &[0.5, 0.3, 0.2]),
            offer("k", 2, &[0.5, 0.3, 0.2]),
        ];
        assert_eq!(redistributed(&equal), [2, 2]);
        let odd = [offer("q", 2, &[0.5, 0.3, 0.2]), offer("k", 1, &[0.5, 0.3])];
        assert_eq!(redistributed(&odd), [2, 1]);
    }

    #[test]
    fn offers_are_bounded_by_the_smaller_side() {
        assert_eq!(offered(4, 2.0, (100, 50)), 8);
        assert_eq!(offered(4, 1.6, (100, 50)), 6);
        assert_eq!(offered(4, 1e9, (100, 50)), 50);
        assert_eq!(offered(4, 1.0, (100, 50)), 4);
    }

    #[test]
    fn shares_are_of_the_trace_whatever_the_rows_lengths() {
        let scatter = [3.0, 0.0, 0.0, 1.0];
        let got = shares(&[2.0, 0.0, 0.0, 0.5, 0.0, 0.0], 2, &scatter);
        assert_eq!(got, [0.75, 0.25, 0.0]);
        assert_eq!(shares(&[1.0, 0.0], 2, &[0.0; 4]), [0.0]);
    }

    #[test]
    fn settings_hold_the_new_ranks_and_keep_the_scaling() {
        let mut config = AdapterConfig {
            rank: 4,
            alpha: 6.0,
            rank_pattern: vec![("b".into(), 2)],
            layers: Some(vec![0]),
            ..AdapterConfig::default()
        };
        let before = config.scaling_at("m.a").unwrap();
        let ranks = [("m.a", 6), ("m.b", 1), ("m.c", 0), ("m.d", 4)];
        let ranks = ranks.map(|(site, rank)| (site.to_owned(), rank));
        assign(&mut config, &ranks).unwrap();
        assert_eq!(
            config.rank_pattern,
            [("m.a".to_owned(), 6), ("m.b".to_owned(), 1)]
        );
        assert_eq!(
            config.alpha_pattern,
            [("m.a".to_owned(), 9.0), ("m.b".to_owned(), 3.0)]
        );
        assert_eq!(config.scaling_at("m.a").unwrap(), before);
        assert_eq!(
            config.targets,
            Targets::Names(vec!["m.a".into(), "m.b".into(), "m.d".into()])
        );
        assert_eq!(config.layers, None);
    }

    #[test]
    fn factors_are_cut_to_their_first_directions() {
        let mut factors = Factors {
            a: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            b: vec![1.0, 2.0, 3.0, 4.0],
        };
        cut(&mut factors, 2, 1);
        assert_eq!(
            (factors.a, factors.b),
            (vec![1.0, 2.0, 3.0], vec![1.0, 3.0])
        );
    }
}

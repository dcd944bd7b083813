//! LoHa: an elementwise product of two low-rank matrices beside each frozen weight.
//!
//! ```text
//! W' = W + s (A1 B1) * (A2 B2)        s = alpha / rank, * elementwise
//!
//! W: (d_out, d_in) frozen      A1, A2: (d_out, rank)      B1, B2: (rank, d_in)
//! ```
//!
//! Trained: all four factors. At the start B2 is 0, so the model is unchanged, and the others are
//! uniform in +-1/sqrt(number of their columns), as in PEFT; LyCORIS draws normal numbers and has
//! A2 = 0. The product has a rank of up to `rank^2`: it is a product of two factors, one with a
//! column for each pair of columns of A1 and A2, one with a row for each pair of rows of B1 and B2.
//! Cost: `2 rank (d_in + d_out)` parameters a site, `rank^2 (d_in + d_out)` multiply-adds a token,
//! or the dense product where that is cheaper. Papers: 2108.06098 (FedPara), 2309.14859 (LyCORIS).

use std::sync::Arc;

use burn::tensor::Tensor;
use tangent_model::{Beside, Parameter, Pass, Site, WeightAdapter};
use tangent_ops::FrozenMatrix;

use super::cost::{Cost, Input};
use super::low_rank::{self, Product, checked_rank};
use super::lycoris;
use super::{ALL_LINEAR, Attach, Common, Method, PeftType, linear_only};
use crate::adapter::Scope;
use crate::config::AdapterConfig;
use crate::error::PeftError;
use crate::init::uniform;
use crate::peft_format;

/// The method's entry.
pub const METHOD: Method = Method {
    id: "loha",
    summary: "an elementwise product of two low-rank matrices",
    paper: "2108.06098, 2309.14859",
    identity_at_start: true,
    whole_model: false,
    rank: 8,
    reads: &[Common::Rank, Common::Alpha, Common::Patterns],
    settings: &[],
    attach: Attach::Weight(attach),
    targets: ALL_LINEAR,
    cost,
    control: None,
    peft: Some(PeftType {
        name: "LOHA",
        of_modules: true,
        known_to_peft: true,
        keys: &[
            "r",
            "alpha",
            "rank_pattern",
            "alpha_pattern",
            "rank_dropout",
            "module_dropout",
            // Start values only.
            "init_weights",
            // Convolutions only.
            "use_effective_conv2d",
        ],
        claims: |_| true,
        read: lycoris::read,
        write: lycoris::write,
        tensors: peft_format::tensors,
    }),
};

fn attach(
    config: &AdapterConfig,
    site: &Site,
    scope: &mut Scope<'_>,
) -> Result<Arc<dyn WeightAdapter>, PeftError> {
    linear_only(METHOD.id, site)?;
    let rank = checked_rank(config, site)?;
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    let (columns, inputs) = (vec![rows, rank], vec![rank, cols]);
    Ok(Arc::new(LoHa {
        a1: scope.parameter(site, "hada_w1_a", columns.clone(), |rng| {
            uniform(rng, rows * rank, rank)
        }),
        b1: scope.parameter(site, "hada_w1_b", inputs.clone(), |rng| {
            uniform(rng, rank * cols, cols)
        }),
        a2: scope.parameter(site, "hada_w2_a", columns, |rng| {
            uniform(rng, rows * rank, rank)
        }),
        b2: scope.parameter(site, "hada_w2_b", inputs, |_| vec![0.0; rank * cols]),
        scaling: config.scaling_at(&site.path)?,
    }))
}

/// Whether the dense product takes less than factors of rank `rank^2` do.
fn is_dense(rank: usize, (rows, cols): (usize, usize)) -> bool {
    rank * rank * (rows + cols) > rows * cols
}

fn cost(config: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let rank = config.rank_at(&site.path)?;
    let (rows, cols) = (site.weight.rows(), site.weight.cols());
    if is_dense(rank, (rows, cols)) {
        return Ok(Cost {
            // `A1 B1`, `A2 B2` and their scaled product.
            per_pass: 3 * rows * cols,
            trained_work: rows * cols,
            // Two products, and two gradients of each.
            pass_work: 6 * rank * rows * cols,
            input: Input::Kept,
            ..Cost::NOTHING
        });
    }
    let pairs = rank * rank;
    Ok(Cost {
        per_pass: pairs * (rows + cols),
        ..Product::cost(pairs, site, 0.0)
    })
}

struct LoHa {
    a1: Parameter,
    b1: Parameter,
    a2: Parameter,
    b2: Parameter,
    scaling: f32,
}

impl LoHa {
    /// `s (A1 B1) * (A2 B2)`.
    fn delta(&self, pass: &Pass) -> Tensor<2> {
        let first = pass.value(&self.a1).matmul(pass.value(&self.b1));
        let second = pass.value(&self.a2).matmul(pass.value(&self.b2));
        first * second * self.scaling
    }

    /// The same as a product of factors of rank `rank^2`; none where the dense one is cheaper.
    fn product(&self, pass: &Pass) -> Option<Product> {
        let (a1, a2) = (pass.value(&self.a1), pass.value(&self.a2));
        let (b1, b2) = (pass.value(&self.b1), pass.value(&self.b2));
        let ([rows, rank], [_, cols]) = (a1.dims(), b1.dims());
        if is_dense(rank, (rows, cols)) {
            return None;
        }
        let pairs = rank * rank;
        let columns: Tensor<3> = a1.reshape([rows, rank, 1]) * a2.reshape([rows, 1, rank]);
        let inputs: Tensor<3> = b1.reshape([rank, 1, cols]) * b2.reshape([1, rank, cols]);
        Some(Product {
            a: inputs.reshape([pairs, cols]),
            b: columns.reshape([rows, pairs]),
            scaling: self.scaling,
            dropout: 0.0,
        })
    }
}

impl WeightAdapter for LoHa {
    fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
        base + self.delta(pass)
    }

    fn linear(&self, x: Tensor<2>, base: &FrozenMatrix, pass: &Pass) -> Tensor<2> {
        match self.product(pass) {
            Some(product) => product.linear(x, base, pass),
            None => {
                let delta = tangent_ops::linear(x.clone(), self.delta(pass));
                tangent_ops::frozen_linear(x, base) + delta
            }
        }
    }

    fn gated_linear(
        &self,
        gate: Tensor<2>,
        up: Tensor<2>,
        base: &FrozenMatrix,
        pass: &Pass,
    ) -> Tensor<2> {
        match self.product(pass) {
            Some(product) => product.gated_linear(gate, up, base, pass),
            None => self.linear(tangent_ops::swiglu(gate, up), base, pass),
        }
    }

    fn beside(&self, pass: &Pass) -> Beside {
        match self.product(pass) {
            Some(product) => low_rank::beside(product.dropout, pass, || product),
            None => Beside::Other,
        }
    }

    fn is_additive(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// Factors of rank 2 with numbers from 1, 2, 3 and so on.
    fn loha(rows: usize, cols: usize) -> LoHa {
        let device = Device::flex();
        let parameter = |rows: usize, cols: usize, first: usize| {
            let values = (first..first + rows * cols)
                .map(|v| v as f32 / 8.0)
                .collect();
            Parameter::new("factor", vec![rows, cols], values, &device)
        };
        LoHa {
            a1: parameter(rows, 2, 1),
            b1: parameter(2, cols, 2),
            a2: parameter(rows, 2, 3),
            b2: parameter(2, cols, 4),
            scaling: 64.0 * 64.0,
        }
    }

    #[test]
    fn known_factors_give_a_known_product() {
        let pass = Pass::inference(&Device::flex());
        // [1 2; 3 4] [2 3; 4 5] = [10 13; 22 29], [3 4; 5 6] [4 5; 6 7] = [36 43; 56 67].
        let want = [360.0, 559.0, 1232.0, 1943.0];
        assert_eq!(tangent_ops::values(loha(2, 2).delta(&pass)), want);
    }

    #[test]
    fn pairs_of_factors_give_the_same_product_where_they_are_cheaper() {
        let pass = Pass::inference(&Device::flex());
        assert!(loha(2, 2).product(&pass).is_none());
        let loha = loha(12, 6);
        let Product { a, b, scaling, .. } = loha.product(&pass).unwrap();
        assert_eq!((a.dims(), b.dims()), ([4, 6], [12, 4]));
        let got = tangent_ops::values(b.matmul(a) * scaling);
        for (got, want) in got.iter().zip(tangent_ops::values(loha.delta(&pass))) {
            assert!((got - want).abs() <= 1e-5 * want, "{got} {want}");
        }
    }
}

//! Sites without a closed form: the projection of the gradient by least squares over the
//! parameters.
//!
//! ```text
//! P_T G = J v,   J^T J v = J^T G,   J = dW'/dp
//! ```
//!
//! `W'` is the adapter's definition, `WeightAdapter::weight`. `J v` comes from central differences
//! of it, `J^T u` from automatic differentiation. A method may take something as a constant for its
//! gradients; then the two are not transposes of each other, but span and are solved all the same,
//! since the system is solved as a general one. Parameters are scaled tensor by tensor such that
//! each moves `W'` as much as the others; a tensor that moves nothing is left out.
//!
//! With `w = J v` in `T`, `<w, G>^2 / ||w||^2` is `||P_T G||^2` up to the square of what `v` lacks.
//! What differences of it lack is not in `T` and counts once, so these are taken twice and
//! extrapolated.

use std::sync::Arc;

use burn::tensor::{Device, Tensor};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tangent_model::site::{WeightAdapter, dense};
use tangent_model::{Parameter, Pass, Site};

use super::basis::sum_of_products as dot;
use super::gmres::{self, Limits, norm};

/// How exactly the least squares are solved. Such residuals leave some 1e-5 of `kappa`; a dozen
/// products do for a scaled low-rank product, a hundred for products of entries.
const LIMITS: Limits = Limits {
    tolerance: 1e-4,
    products: 150,
};
/// Length of the steps of central differences, as a share of that of the parameters: where they are
/// extrapolated, and in the iteration.
const STEP: f64 = 1e-2;
const SHORT_STEP: f64 = 3e-3;

/// A site's weight as a function of its parameters, near given values of them.
pub(super) struct Definition<'a> {
    adapter: Arc<dyn WeightAdapter>,
    base: Tensor<2>,
    shape: (usize, usize),
    parameters: &'a [&'a Parameter],
    at: Vec<f64>,
    constant: Pass,
    tracked: Pass,
}

impl<'a> Definition<'a> {
    /// The definition near the parameters' values `at`; `None` if nothing is attached. Parameters
    /// are moved about while it is used: who has one sets them back.
    pub fn new(
        site: &Site,
        parameters: &'a [&'a Parameter],
        at: &[Vec<f32>],
        device: &Device,
    ) -> Option<Self> {
        let adapter = site.attached()?;
        let constant = Pass::inference(device);
        let shape = (site.weight.rows(), site.weight.cols());
        // What does not depend on the weight is differentiated without it, which rounds less.
        let base = match adapter.is_additive() {
            true => Tensor::zeros([shape.0, shape.1], device),
            false => dense(&site.weight, &constant),
        };
        let tracked = Pass {
            tracked: true,
            ..constant.clone()
        };
        let at = at.iter().flatten().map(|v| f64::from(*v)).collect();
        let definition = Self {
            adapter,
            base,
            shape,
            parameters,
            at,
            constant,
            tracked,
        };
        definition.place(&definition.at);
        Some(definition)
    }

    /// Gives the parameters these values.
    fn place(&self, values: &[f64]) {
        let mut rest = values;
        for parameter in self.parameters {
            let (own, later) = rest.split_at(parameter.count().min(rest.len()));
            parameter.set(own.iter().map(|v| *v as f32).collect());
            rest = later;
        }
    }

    fn weight(&self) -> Vec<f32> {
        let weight = self.adapter.weight(self.base.clone(), &self.constant);
        tangent_ops::values(weight)
    }

    /// `J v`, row-major.
    pub fn push(&self, v: &[f64]) -> Vec<f64> {
        let (near, far) = (self.difference(v, STEP), self.difference(v, 2.0 * STEP));
        let exact = |(near, far): (&f64, &f64)| (4.0 * near - far) / 3.0;
        near.iter().zip(&far).map(exact).collect()
    }

    /// `J v` from one central difference, of steps of this share of the parameters.
    fn difference(&self, v: &[f64], share: f64) -> Vec<f64> {
        let size = norm(v);
        if size == 0.0 {
            return vec![0.0; self.shape.0 * self.shape.1];
        }
        let step = share * norm(&self.at).max(1.0) / size;
        let moved = |by: f64| -> Vec<f32> {
            let values: Vec<f64> = self.at.iter().zip(v).map(|(p, v)| p + by * v).collect();
            self.place(&values);
            self.weight()
        };
        let (plus, minus) = (moved(step), moved(-step));
        self.place(&self.at);
        let difference = |(p, m): (&f32, &f32)| (f64::from(*p) - f64::from(*m)) / (2.0 * step);
        plus.iter().zip(&minus).map(difference).collect()
    }

    /// `J^T u` for a row-major `u`.
    fn pull(&self, u: &[f32]) -> Vec<f64> {
        let (rows, cols) = self.shape;
        let u = tangent_ops::tensor(u.to_vec(), rows, cols, &self.constant.device);
        let weight = self.adapter.weight(self.base.clone(), &self.tracked);
        if !weight.is_tracked() {
            // Nothing moves it now.
            return vec![0.0; self.at.len()];
        }
        let mut gradients = (weight * u).sum().backward();
        let parts = self.parameters.iter().map(|parameter| {
            let gradient = parameter.take_gradient(&mut gradients);
            gradient.unwrap_or_else(|| vec![0.0; parameter.count()])
        });
        parts.flatten().map(f64::from).collect()
    }

    /// `||P_T g||^2 / ||g||^2`.
    pub fn captured(&self, g: &[f32]) -> f64 {
        let scales = self.scales();
        let scaled = |v: &[f64]| -> Vec<f64> {
            let pairs = v.iter().zip(&scales);
            pairs.map(|(v, s)| v * s).collect()
        };
        let right = scaled(&self.pull(g));
        let product = |z: &[f64]| {
            let moved = self.difference(&scaled(z), SHORT_STEP);
            let moved: Vec<f32> = moved.iter().map(|v| *v as f32).collect();
            scaled(&self.pull(&moved))
        };
        let v = scaled(&gmres::solve(product, &right, LIMITS));
        let captured = self.push(&v);
        let g: Vec<f64> = g.iter().map(|v| f64::from(*v)).collect();
        let (inner, size) = (dot(&captured, &g), norm(&captured) * norm(&g));
        match size > 0.0 {
            true => (inner / size).powi(2),
            false => 0.0,
        }
    }

    /// For every value a factor with which its tensor moves the weight as far as it is moved
    /// itself.
    fn scales(&self) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let mut scales = vec![0.0; self.at.len()];
        let mut first = 0;
        for parameter in self.parameters {
            let own = first..(first + parameter.count()).min(self.at.len());
            let mut probe = vec![0.0; self.at.len()];
            for value in &mut probe[own.clone()] {
                *value = random.random::<f64>() - 0.5;
            }
            let reached = norm(&self.difference(&probe, SHORT_STEP));
            if reached > 0.0 {
                scales[own.clone()].fill(norm(&probe) / reached);
            }
            first = own.end;
        }
        scales
    }
}

#[cfg(test)]
mod tests {
    use tangent_model::SiteKind;
    use tangent_ops::FrozenMatrix;

    use super::*;

    /// `W'[i][j] = m[i] (W[i][j] + a[0] a[j])`, whose gradients take the row's own `a[0]` as a
    /// constant if `detached`.
    struct Odd {
        m: Parameter,
        a: Parameter,
        detached: bool,
    }

    impl WeightAdapter for Odd {
        fn weight(&self, base: Tensor<2>, pass: &Pass) -> Tensor<2> {
            let (m, a) = (pass.value(&self.m), pass.value(&self.a));
            let mut first = a.clone().slice([0..1, 0..1]);
            if self.detached {
                first = first.detach();
            }
            (base + a * first) * m.transpose()
        }
    }

    fn captured(detached: bool, g: &[f32]) -> f64 {
        let device = Device::flex();
        let m = Parameter::new("q.m", vec![2], vec![1.0, 2.0], &device);
        let a = Parameter::new("q.a", vec![3], vec![1.0, 0.0, 0.0], &device);
        let weight = FrozenMatrix::from_values(vec![0.0, 1.0, 0.0, -1.0, 0.0, 0.0], 2, 3);
        let mut site = Site::new("q".into(), SiteKind::Linear, Some(0), weight);
        let parameters = [&m, &a];
        let at = [m.values(), a.values()];
        let (m, a) = (m.clone(), a.clone());
        site.attach(Arc::new(Odd { m, a, detached }));
        let definition = Definition::new(&site, &parameters, &at, &device).unwrap();
        let captured = definition.captured(g);
        assert_eq!(parameters.map(Parameter::values), at, "set back");
        captured
    }

    #[test]
    fn the_projection_is_the_explicit_one() {
        // W + a0 a = [1 1 0; 0 0 0] and m = (1, 2), so T is spanned by [1 1 0; 0 0 0],
        // [1 0 0; 2 0 0], [0 1 0; 0 2 0] and [0 0 1; 0 0 2].
        for detached in [false, true] {
            let close = |g: &[f32], want: f64| {
                let got = captured(detached, g);
                assert!((got - want).abs() < 1e-5, "{g:?}: {got}, not {want}");
            };
            close(&[1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1.0);
            close(&[0.0, 0.0, 1.0, 0.0, 0.0, 2.0], 1.0);
            close(&[0.0, 0.0, 2.0, 0.0, 0.0, -1.0], 0.0);
            close(&[0.0, 0.0, 0.0, 0.0, 0.0, 1.0], 0.8);
            // Columns orthogonal to m; of such, T has those that are equal in the first two.
            close(&[2.0, 2.0, 0.0, -1.0, -1.0, 0.0], 1.0);
            close(&[2.0, -2.0, 0.0, -1.0, 1.0, 0.0], 0.0);
        }
    }

    #[test]
    fn differences_are_derivatives() {
        let device = Device::flex();
        let m = Parameter::new("q.m", vec![2], vec![1.0, 2.0], &device);
        let a = Parameter::new("q.a", vec![3], vec![0.5, -1.0, 2.0], &device);
        let weight = FrozenMatrix::from_values(vec![0.3; 6], 2, 3);
        let mut site = Site::new("q".into(), SiteKind::Linear, None, weight);
        site.attach(Arc::new(Odd {
            m: m.clone(),
            a: a.clone(),
            detached: false,
        }));
        let parameters = [&m, &a];
        let at = [m.values(), a.values()];
        let definition = Definition::new(&site, &parameters, &at, &device).unwrap();
        let v = [0.2, -0.4, 0.3, 0.1, -0.5];
        let u = [1.0f32, -2.0, 0.5, 0.25, -3.0, 1.0];
        let pushed = definition.push(&v);
        let there: f64 = pushed.iter().zip(&u).map(|(p, u)| p * f64::from(*u)).sum();
        let back = dot(&definition.pull(&u), &v);
        assert!((there - back).abs() < 1e-4 * back.abs(), "{there} {back}");
    }
}

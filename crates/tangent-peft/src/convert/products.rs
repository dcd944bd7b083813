//! The change of a weight by methods whose parameters are two thin factors of it.

use tangent_linalg::{Mat, mat};
use tangent_model::Parameter;

use super::change::Thin;
use super::parameter;
use crate::adapter::Adapter;
use crate::methods::{adalora, lora};

/// The change of the site `path` by its own factors; `None` if the method has others.
pub(super) fn of(adapter: &Adapter, path: &str) -> Option<Thin> {
    let id = adapter.method.id;
    if id == lora::METHOD.id {
        pair(adapter, path).or_else(|| embedding(adapter, path))
    } else if id == adalora::METHOD.id {
        triplets(adapter, path)
    } else {
        None
    }
}

/// The values of a factor.
fn matrix(parameter: &Parameter) -> Mat<f64> {
    match parameter.shape() {
        [rows, cols] => mat(&parameter.values(), *rows, *cols),
        other => unreachable!("a factor is a matrix, not {other:?}"),
    }
}

fn transposed(m: &Mat<f64>) -> Mat<f64> {
    m.transpose().to_owned()
}

/// `s B A`, less `s B0 A0` where that is taken out of the base.
fn pair(adapter: &Adapter, path: &str) -> Option<Thin> {
    let pair = adapter.pairs.iter().find(|pair| pair.site == path)?;
    let a = matrix(adapter.parameters.get(pair.a)?);
    let b = matrix(adapter.parameters.get(pair.b)?);
    let scaling = f64::from(pair.scaling);
    let scaled = |b: &Mat<f64>, a: &Mat<f64>| Thin {
        left: b.map(|v| scaling * v),
        right: transposed(a),
    };
    let trained = scaled(&b, &a);
    let Some(offset) = &pair.offset else {
        return Some(trained);
    };
    let a0 = mat(&offset.a, a.nrows(), a.ncols());
    let b0 = mat(&offset.b, b.nrows(), b.ncols());
    Some(trained.minus(&scaled(&b0, &a0)))
}

/// `s (B A)^T`.
fn embedding(adapter: &Adapter, path: &str) -> Option<Thin> {
    let a = matrix(parameter(adapter, &format!("{path}.lora_embedding_A"))?);
    let b = matrix(parameter(adapter, &format!("{path}.lora_embedding_B"))?);
    let scaling = f64::from(adapter.config.scaling_at(path).ok()?);
    Some(Thin {
        left: transposed(&a).map(|v| scaling * v),
        right: b,
    })
}

/// `s B diag(E) A` without the triplets whose E is 0.
fn triplets(adapter: &Adapter, path: &str) -> Option<Thin> {
    let a = matrix(parameter(adapter, &format!("{path}.lora_A"))?);
    let e = parameter(adapter, &format!("{path}.lora_E"))?.values();
    let b = matrix(parameter(adapter, &format!("{path}.lora_B"))?);
    let scaling = f64::from(adalora::scaling(&adapter.config));
    let kept = e.iter().enumerate().filter(|(_, e)| **e != 0.0);
    let kept: Vec<(usize, f64)> = kept.map(|(k, e)| (k, scaling * f64::from(*e))).collect();
    let left = Mat::from_fn(b.nrows(), kept.len(), |i, j| {
        let (k, e) = kept[j];
        e * b[(i, k)]
    });
    let right = Mat::from_fn(a.ncols(), kept.len(), |i, j| a[(kept[j].0, i)]);
    Some(Thin { left, right })
}

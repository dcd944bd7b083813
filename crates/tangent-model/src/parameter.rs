//! Trained tensors, shared between the adapter that uses them and the optimizer that moves them.

use std::sync::{Arc, RwLock};

use burn::tensor::{Device, Gradients, Tensor};

/// A named trained tensor. Cloning shares it.
///
/// Values are held as a `(rows, cols)` matrix; a vector of `n` is `(1, n)`. `shape` is the shape
/// in files.
#[derive(Clone, Debug)]
pub struct Parameter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    shape: Vec<usize>,
    device: Device,
    leaf: RwLock<Tensor<2>>,
}

fn matrix_shape(shape: &[usize]) -> (usize, usize) {
    match shape {
        [n] => (1, *n),
        [rows, cols] => (*rows, *cols),
        other => unreachable!("parameters are vectors or matrices, not {other:?}"),
    }
}

impl Parameter {
    /// A parameter with the given start values.
    ///
    /// # Panics
    /// If `values` does not fit `shape` or `shape` has other than one or two dimensions.
    pub fn new(
        name: impl Into<String>,
        shape: Vec<usize>,
        values: Vec<f32>,
        device: &Device,
    ) -> Self {
        let (rows, cols) = matrix_shape(&shape);
        let leaf = tangent_ops::tensor(values, rows, cols, device);
        Self(Arc::new(Inner {
            name: name.into(),
            shape,
            device: device.clone(),
            leaf: RwLock::new(leaf.autodiff().require_grad()),
        }))
    }

    /// Name, unique in an adapter: the site's path and the tensor's suffix in files.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Shape in files.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// The tensor, tracked or as a constant.
    pub(crate) fn get(&self, tracked: bool) -> Tensor<2> {
        let leaf = self.leaf().clone();
        if tracked {
            leaf
        } else {
            leaf.without_autodiff()
        }
    }

    /// A copy of the values, row-major.
    pub fn values(&self) -> Vec<f32> {
        tangent_ops::values(self.leaf().clone())
    }

    /// Replaces the values.
    ///
    /// # Panics
    /// If the number of values differs.
    pub fn set(&self, values: Vec<f32>) {
        let (rows, cols) = matrix_shape(&self.0.shape);
        let leaf = tangent_ops::tensor(values, rows, cols, &self.0.device);
        *self.0.leaf.write().unwrap_or_else(|e| e.into_inner()) = leaf.autodiff().require_grad();
    }

    /// Changes the values in place; no copy is made while nothing else holds the tensor.
    pub fn update(&self, change: impl FnOnce(&mut [f32])) {
        let (rows, cols) = matrix_shape(&self.0.shape);
        let mut leaf = self.0.leaf.write().unwrap_or_else(|e| e.into_inner());
        let nothing = Tensor::zeros([1, 1], &self.0.device);
        let mut values = tangent_ops::values(std::mem::replace(&mut *leaf, nothing));
        change(&mut values);
        let moved = tangent_ops::tensor(values, rows, cols, &self.0.device);
        *leaf = moved.autodiff().require_grad();
    }

    /// Takes this parameter's gradient out of `gradients`; `None` if it took no part.
    pub fn take_gradient(&self, gradients: &mut Gradients) -> Option<Vec<f32>> {
        self.leaf().grad_remove(gradients).map(tangent_ops::values)
    }

    fn leaf(&self) -> std::sync::RwLockReadGuard<'_, Tensor<2>> {
        self.0.leaf.read().unwrap_or_else(|e| e.into_inner())
    }
}

//! Tensors that were written as `f32`, read out of a safetensors file again.

use safetensors::{Dtype, SafeTensors};

/// The values of the tensor `name`, row-major, which must be `f32` of this shape.
///
/// # Errors
/// In words, if it is missing, of another shape or of another type.
pub fn values(file: &SafeTensors<'_>, name: &str, shape: &[usize]) -> Result<Vec<f32>, String> {
    let view = file.tensor(name).map_err(|error| error.to_string())?;
    if view.dtype() != Dtype::F32 || view.shape() != shape {
        let (dtype, got) = (view.dtype(), view.shape());
        return Err(format!(
            "tensor \"{name}\" has shape {got:?} as {dtype:?}, expected {shape:?} as F32"
        ));
    }
    let numbers = view.data().as_chunks::<4>().0.iter();
    Ok(numbers.map(|b| f32::from_le_bytes(*b)).collect())
}

#[cfg(test)]
mod tests {
    use safetensors::tensor::TensorView;

    use super::*;

    #[test]
    fn values_come_back_and_other_tensors_are_told() {
        let bytes: Vec<u8> = [1f32, -2.5]
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        let tensors = [
            (
                "wide",
                TensorView::new(Dtype::F32, vec![1, 2], &bytes).unwrap(),
            ),
            (
                "half",
                TensorView::new(Dtype::F16, vec![1, 4], &bytes).unwrap(),
            ),
        ];
        let file = safetensors::serialize(tensors, None).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(values(&file, "wide", &[1, 2]), Ok(vec![1.0, -2.5]));
        for (name, shape, words) in [
            ("wide", [2, 1], "shape [1, 2]"),
            ("half", [1, 4], "as F16"),
            ("none", [1, 2], "none"),
        ] {
            let why = values(&file, name, &shape).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }
}

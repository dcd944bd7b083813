//! What a method takes at one site, so that memory and time of a run can be told before it runs.

use tangent_model::Site;

use crate::config::AdapterConfig;
use crate::error::PeftError;

/// What a method takes at a site that it adapts.
pub type CostAt = fn(&AdapterConfig, &Site) -> Result<Cost, PeftError>;

/// How the input of a site is kept for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Not at all.
    Unread,
    /// As it is.
    Kept,
    /// As it is; where it is `silu(gate) * up`, it is formed again from these.
    FormedAgain,
    /// The same; and where it is a normalized stream, it is formed again from the stream if that is
    /// so at all sites that read it.
    FormedAgainTogether,
}

/// What a method takes at one site in training, beside the trained values and the product of the
/// frozen weight. Memory is counted in `f32` values, work in multiply-adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// How the input is kept.
    pub input: Input,
    /// Values that are kept for the backward pass of every token, beside the input.
    pub per_token: usize,
    /// Values that are formed anew in a pass and kept for its backward pass, whatever its tokens
    /// are.
    pub per_pass: usize,
    /// Values that are held as long as the run lasts.
    pub resident: usize,
    /// Values that the site's operation forms and lets go again within its backward pass, whatever
    /// its tokens are.
    pub working: usize,
    /// Work of a token with what trains, in the forward pass. The backward pass does twice as much.
    pub trained_work: usize,
    /// Work of a token with the frozen weight beyond its one product, in the forward pass. The
    /// backward pass does as much.
    pub frozen_work: usize,
    /// Work of a pass whatever its tokens are, forward and backward.
    pub pass_work: usize,
}

impl Cost {
    /// Nothing.
    pub const NOTHING: Self = Self {
        input: Input::Unread,
        per_token: 0,
        per_pass: 0,
        resident: 0,
        working: 0,
        trained_work: 0,
        frozen_work: 0,
        pass_work: 0,
    };

    /// A weight that trains itself; the work of its gradient follows from its size.
    pub const OF_WEIGHT: Self = Self {
        input: Input::Kept,
        ..Self::NOTHING
    };
}

/// A trained weight in the place of the frozen one.
///
/// # Errors
/// Never.
pub fn of_weight(_: &AdapterConfig, _: &Site) -> Result<Cost, PeftError> {
    Ok(Cost::OF_WEIGHT)
}

/// What a method takes that adapts no weight.
///
/// # Errors
/// Never.
pub fn nothing(_: &AdapterConfig, _: &Site) -> Result<Cost, PeftError> {
    Ok(Cost::NOTHING)
}

/// The cost of a method that has a definition and no fast path: the effective weight is formed from
/// the dense frozen one, and multiplied with. What it takes to form it is not known.
///
/// # Errors
/// Never.
pub fn of_definition(_: &AdapterConfig, site: &Site) -> Result<Cost, PeftError> {
    let weight = site.weight.rows() * site.weight.cols();
    Ok(Cost {
        // The frozen and the effective one.
        per_pass: 2 * weight,
        // Its gradient is one product more than a frozen weight has, not three.
        trained_work: weight / 3,
        ..Cost::OF_WEIGHT
    })
}

#[cfg(test)]
mod tests {
    use tangent_model::SiteKind;
    use tangent_ops::FrozenMatrix;

    use super::*;
    use crate::methods::find;
    use crate::setting::SettingValue;

    /// A site of 32 outputs and 48 inputs.
    fn site() -> Site {
        let weight = FrozenMatrix::from_values(vec![0.0; 32 * 48], 32, 48);
        Site::new("down_proj".into(), SiteKind::Linear, Some(0), weight)
    }

    fn config(method: &str, rank: usize) -> AdapterConfig {
        AdapterConfig {
            method: method.into(),
            rank,
            ..AdapterConfig::default()
        }
    }

    /// Holds a cost that has no working values, but for the input, to numbers in the order of its
    /// fields.
    #[track_caller]
    fn check(config: &AdapterConfig, input: Input, want: [usize; 6]) {
        config.validate().unwrap();
        let cost = (find(&config.method).unwrap().cost)(config, &site()).unwrap();
        let [
            per_token,
            per_pass,
            resident,
            trained_work,
            frozen_work,
            pass_work,
        ] = want;
        let want = Cost {
            input,
            per_token,
            per_pass,
            resident,
            working: 0,
            trained_work,
            frozen_work,
            pass_work,
        };
        assert_eq!(cost, want, "{config:?}");
    }

    const SIDES: usize = 32 + 48;
    const WEIGHT: usize = 32 * 48;

    #[test]
    fn products_of_two_factors() {
        let again = Input::FormedAgainTogether;
        check(&config("lora", 4), again, [4, 0, 0, 4 * SIDES, 0, 0]);
        let own = 2 * 4 * (SIDES + 1);
        let formed = 4 * 48;
        let want = [4, formed, own, 4 * SIDES, 0, 0];
        check(&config("adalora", 4), again, want);
        let want = [4, 4 * SIDES, 0, 4 * SIDES, 0, 0];
        check(&config("vera", 4), again, want);
        let dropped = AdapterConfig {
            dropout: 0.1,
            ..config("lora", 4)
        };
        check(&dropped, Input::Unread, [4 + 48, 0, 0, 4 * SIDES, 0, 0]);
        // Both products, whose factors are joined.
        let moved = AdapterConfig {
            init: "pissa".into(),
            ..config("lora", 4)
        };
        let want = [8, 8 * SIDES, 12 * SIDES, 8 * SIDES, 0, 0];
        check(&moved, again, want);
    }

    #[test]
    fn lengths_of_rows() {
        let again = Input::FormedAgain;
        let along = 4 * WEIGHT;
        let want = [4 + 32, 64, 32, 4 * SIDES, 0, along];
        check(&config("dora", 4), again, want);
        let dropped = AdapterConfig {
            dropout: 0.1,
            ..config("dora", 4)
        };
        let want = [4 + 48 + 32, 64, 32, 4 * SIDES, WEIGHT, along];
        check(&dropped, Input::Unread, want);
        let moved = AdapterConfig {
            init: "pissa".into(),
            ..config("dora", 4)
        };
        let resident = 12 * SIDES + 32;
        let want = [8 + 32, 8 * SIDES + 64, resident, 8 * SIDES, 0, 2 * along];
        check(&moved, again, want);
        let exact = AdapterConfig {
            own: [("detach_norm".to_owned(), SettingValue::Flag(false))].into(),
            ..config("dora", 4)
        };
        let want = [4 + 32, 64 + 4 * 32 + 16, 32, 4 * SIDES, 0, 2 * along];
        check(&exact, again, want);
    }

    #[test]
    fn products_of_other_kinds() {
        // 16 pairs of factors; 25 would be dearer than the dense product.
        let want = [16, 16 * SIDES, 0, 16 * SIDES, 0, 0];
        check(&config("loha", 4), Input::FormedAgainTogether, want);
        let want = [0, 3 * WEIGHT, 0, WEIGHT, 0, 6 * 5 * WEIGHT];
        check(&config("loha", 5), Input::Kept, want);
        // (4, 6) and (8, 8), the second of rank 2: X is (6, 8).
        let want = [6 * 8, 0, 0, 6 * 64 + 8 * 24, 0, 0];
        check(&config("lokr", 4), Input::Kept, want);
        let want = [6 * 8 + 6 * 2, 0, 0, 6 * 2 * 16 + 8 * 24, 0, 0];
        check(&config("lokr", 2), Input::Kept, want);
        check(&config("full", 1), Input::Kept, [0; 6]);
    }

    #[test]
    fn rotations() {
        let rotation = |own: &[(&str, SettingValue)]| AdapterConfig {
            own: own
                .iter()
                .map(|(n, v)| ((*n).to_owned(), v.clone()))
                .collect(),
            ..config("oft", 1)
        };
        let size = ("oft_block_size", SettingValue::Number(8.0));
        let blocks = 48 * 8;
        // Q, its square and its cube, and R; three products and two gradients of each.
        let want = [0, 4 * blocks, 3 * 64, blocks, 0, 9 * blocks * 8];
        check(&rotation(std::slice::from_ref(&size)), Input::Kept, want);
        let exact = ("use_cayley_neumann", SettingValue::Flag(false));
        let want = [0, 2 * blocks, 3 * 64, blocks, 0, 5 * blocks * 8];
        check(&rotation(&[size, exact]), Input::Kept, want);
    }

    #[test]
    fn block_diagonal_factors() {
        // Four blocks of 12 inputs, 8 outputs and rank 4.
        let work = 4 * 4 * (12 + 8);
        let want = [4 * 4, 0, 0, work, 0, 0];
        check(&config("monarch", 4), Input::FormedAgain, want);
        let dropped = AdapterConfig {
            dropout: 0.1,
            ..config("monarch", 4)
        };
        check(&dropped, Input::Kept, want);
    }

    #[test]
    fn scaled_inputs_and_outputs() {
        // The site is one whose inputs are scaled, unless none is.
        check(&config("ia3", 1), Input::Kept, [0; 6]);
        let outputs = AdapterConfig {
            own: [("feedforward_modules".to_owned(), SettingValue::text("none"))].into(),
            ..config("ia3", 1)
        };
        check(&outputs, Input::Unread, [32, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn projections_of_a_short_vector() {
        let of = |projection: &'static str| {
            let config = AdapterConfig {
                own: [
                    ("dimension".to_owned(), SettingValue::Number(10.0)),
                    ("projection".to_owned(), SettingValue::text(projection)),
                ]
                .into(),
                ..config("intrinsic", 1)
            };
            config.validate().unwrap();
            let cost = (find("intrinsic").unwrap().cost)(&config, &site()).unwrap();
            assert_eq!((cost.input, cost.per_token), (Input::FormedAgain, 0));
            assert_eq!((cost.per_pass, cost.trained_work), (0, WEIGHT));
            (cost.resident, cost.working, cost.pass_work)
        };
        // The change and the gradient of the weight, beside them transforms of 2048 and 16 numbers.
        let (both, transforms) = (2 * WEIGHT, 2048 + 16);
        let projection = 4 * (2048 * 11 + 16 * 4) + 64 * 2048;
        assert_eq!(of("fastfood"), (0, both + transforms, 3 * projection));
        // Ten columns with a number in each of 39 runs.
        assert_eq!(of("sparse"), (0, both, 3 * 10 * 39));
        assert_eq!(of("dense"), (10 * WEIGHT, both, 3 * 10 * WEIGHT));
    }

    #[test]
    fn a_definition_forms_the_weight_and_its_gradient() {
        let cost = of_definition(&config("lora", 4), &site()).unwrap();
        assert_eq!((cost.input, cost.per_token), (Input::Kept, 0));
        assert_eq!((cost.per_pass, cost.trained_work), (2 * WEIGHT, WEIGHT / 3));
    }
}

//! The choice between a vector and its negative.

/// Whether the entry of largest magnitude (the first of several) is negative.
pub(crate) fn leads_negative(column: &[f64]) -> bool {
    let mut lead = 0.0_f64;
    for &x in column {
        if x.abs() > lead.abs() {
            lead = x;
        }
    }
    lead < 0.0
}

/// Turns a vector around.
pub(crate) fn negate(column: &mut [f64]) {
    for x in column {
        *x = -*x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_entry_decides() {
        assert!(leads_negative(&[1.0, -2.0, 1.5]));
        assert!(!leads_negative(&[-1.0, 2.0]));
        assert!(!leads_negative(&[1.0, -1.0]));
        assert!(!leads_negative(&[0.0]));
        let mut column = [1.0, -2.0];
        negate(&mut column);
        assert_eq!(column, [-1.0, 2.0]);
    }
}

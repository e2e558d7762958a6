// Twin of src/rules/asgd.rs.

struct Scalars {
    // 1 − λ·ηₜ.
    shrink: f32,
    // −ηₜ.
    neg_eta: f32,
    // μₜ.
    mu: f32,
}

// The only variant.
fn asgd(c: Scalars, p: vec4<f32>, g: vec4<f32>, x: ptr<function, vec4<f32>>) -> vec4<f32> {
    let theta = p * c.shrink + c.neg_eta * g;
    let nearer = *x + (theta - *x) * c.mu;
    *x = select(nearer, theta, c.mu == 1.0);
    return theta;
}

const sms = 'http://localhost:50511';
// Each test uses another number, so that tests can run in parallel.
const someNumber = () => '186' + Math.floor(1e7 + Math.random() * 9e7);

it('accepts the sent code', () => {
  const number = someNumber();
  cy.visit('/');
  cy.get('[name=number]').type(number);
  cy.contains('button', 'Send code').click();
  cy.request({ url: `${sms}/inbox.json`, qs: { phone_number: number, wait: '5s' } }).then(({ body: [{ code }] }) => {
    cy.get('[name=code]').type(code);
  });
  cy.contains('button', 'Log in').click();
  cy.contains(`Welcome, ${number}`);
});

it('explains a limit of Aliyun', () => {
  const number = someNumber();
  cy.request('PUT', `${sms}/failures.json`, { phone_number: number, kind: 'limit_minute', times: 1 });
  cy.visit('/');
  cy.get('[name=number]').type(number);
  cy.contains('button', 'Send code').click();
  cy.get('[role=alert]').should('have.text', 'Too many codes. Try again in 1m0s.');
});

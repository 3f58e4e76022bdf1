package config

// Aliyun are the settings of serve for sends. The access key is a secret (secrets.go).
type Aliyun struct {
	Endpoint         string `env:"ALIYUN_ENDPOINT" name:"aliyun-endpoint" default:"${aliyun_endpoint}" placeholder:"URL" help:"URL of Aliyun's product SMS, for template codes such as SMS_123456789 (${default})."`
	PNVSEndpoint     string `env:"ALIYUN_PNVS_ENDPOINT" name:"aliyun-pnvs-endpoint" default:"${aliyun_pnvs_endpoint}" placeholder:"URL" help:"URL of Aliyun's product PNVS, for template codes of six digits (${default})."`
	TemplateVariable string `env:"PHONENUMBER_TEMPLATE_VARIABLE" default:"${template_variable}" type:"variable" placeholder:"NAME" help:"Name of the variable in templates of the product SMS (${default})."`
}
